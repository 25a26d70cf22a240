"""Whether and how this machine puts different adapters into one decode.

On the CPU our own kernels compute each row with its adapters (`mixing_rows`); on other backends, their own operations
compute every row with a stack of adapters, masked (`mixing_stack`). Adapters on experts or token embeddings have no
place in either. `why_not` and `low_rank.problem_of` say what stands in the way; the scheduler then lets adapters take
turns.
"""

from __future__ import annotations

from edgelora.engine import kernels
from edgelora.engine.devices import backend_name
from edgelora.engine.mixer import Mixer
from edgelora.engine.mixing_rows import RowMixer
from edgelora.engine.mixing_stack import StackMixer
from edgelora.engine.model import Model
from edgelora.errors import EdgeloraError


def why_not() -> str:
    """Why this machine cannot mix adapters in a decode; empty if it can."""
    if (kernels.lowrank() if backend_name() == "CPU" else kernels.stack()) is None:
        return "there is no C compiler that could build its kernels (or EDGELORA_NATIVE=0 is set)"
    return ""


def make_mixer(model: Model, max_rows: int) -> Mixer:
    """The mixer for this machine.

    Args:
        max_rows: the largest batch.

    Raises:
        EdgeloraError: `why_not`, or this llama.cpp lays out its graphs in an unknown way.
    """
    if problem := why_not():
        raise EdgeloraError(problem)
    return RowMixer(model, max_rows) if backend_name() == "CPU" else StackMixer(model, max_rows)
