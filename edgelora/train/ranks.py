"""One run in several processes, as torchrun and `accelerate launch` start them: the first writes, all hear of it.

Which process this is says the environment (`RANK`, `WORLD_SIZE`), before anything heavy is imported. How the work is
shared (DDP, FSDP, DeepSpeed) is accelerate's own business, by its own environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from edgelora.errors import EdgeloraError
from edgelora.train.progress import SilentProgress, TrainProgress

Made = TypeVar("Made")


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and talks; alone, it always does."""
    return os.environ.get("RANK", "0") == "0"


def heard(progress: TrainProgress) -> TrainProgress:
    """The same, or silence in all processes but the first."""
    return progress if is_first() else SilentProgress()


def only_first(block: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    """A block's surroundings in the first process, and none in the others."""
    return block() if is_first() else nullcontext()


def join(device: str) -> None:
    """Let the processes find each other; alone, nothing happens."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def by_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, in all of them; where it raises an error of ours, all raise it."""
    if world_size() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    made: list[Any] = [None, None]
    if is_first():
        try:
            made[0] = make()
        except EdgeloraError as error:
            made[1] = error
    made = broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]  # type: ignore[no-any-return]


@contextmanager
def first_ahead() -> Iterator[None]:
    """The block is done by the first process, and then by the others, who find what it left."""
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def wait_for_all() -> None:
    """Until every process is here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Whether it is set in one of the processes."""
    if world_size() == 1:
        return flag
    import torch
    from accelerate import PartialState

    state = PartialState()
    told = torch.tensor([int(flag)], device=state.device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told.item())
