"""What a run tells while it goes on: steps to whoever watches, log lines to metrics.jsonl, Ctrl-C to the trainer."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from edgelora.train import ranks
from edgelora.train.folder import RunFolder
from edgelora.train.peak_memory import memory_now, memory_so_far
from edgelora.train.progress import TrainProgress, TrainStatus
from edgelora.train.recipe import Recipe
from edgelora.train.run_trainer import stopped_early

if TYPE_CHECKING:
    from edgelora.train.run_trainer import RunTrainer

# metrics.jsonl's names for what TRL logs.
LOGGED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "reward_margin",
}
METRICS = {
    "learning_rate": "learning_rate",
    **LOGGED,
    **{f"eval_{theirs}": f"eval_{ours}" for theirs, ours in LOGGED.items()},
}


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each step, writes metrics.jsonl, keeps the best, and turns Ctrl-C into a checkpoint and a stop."""

    def __init__(self, run: RunFolder, recipe: Recipe, progress: TrainProgress) -> None:
        self.run = run
        self.recipe = recipe
        self.progress = progress
        self.trainer: RunTrainer | None = None
        self.interrupted = False
        self.loss = 0.0
        self.eval_loss: float | None = None
        self.steps_per_second = 0.0
        self._began, self._first_step, self._learning_rate = 0.0, 0, 0.0
        self._tokens, self._tokens_at = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step
        self._tokens, self._tokens_at = 0.0, self._began

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._learning_rate = options["lr_scheduler"].get_last_lr()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step - self._first_step
        self.steps_per_second = done / max(time.monotonic() - self._began, 1e-9)
        if self.trainer is not None:
            self.loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
            self.progress.update(self._status(state, self.loss))
        self.interrupted = ranks.any_of(self.interrupted)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self.interrupted:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        loss = metrics.get("eval_loss")
        if loss is None or not self.recipe.ends_with_best:
            return
        if math.isfinite(loss) and (state.best_metric is None or loss < state.best_metric):
            state.best_metric, state.best_global_step = loss, state.global_step
            control.should_save = True
        elif stopped_early(vars(state), self.recipe.early_stopping_patience):
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        found = {METRICS[name]: value for name, value in (logs or {}).items() if name in METRICS}
        if not found:
            return  # the trainer's summary at the end
        self.eval_loss = found.get("eval_loss", self.eval_loss)
        if not ranks.is_first():
            return
        seconds = time.monotonic() - self._began
        when = {"step": state.global_step, "epoch": round(state.epoch, 4)}
        speed = {"seconds": round(seconds, 3), "steps_per_second": round(self.steps_per_second, 4)}
        device = args.device.type
        memory = {"memory_bytes": memory_now(device), "peak_memory_bytes": memory_so_far(device)}
        self.run.log_metrics({**when, **found, **speed, **self._token_speed((logs or {}).get("num_tokens")), **memory})

    def _token_speed(self, tokens: float | None) -> dict[str, float]:
        """Of all processes since the last line, padding left out; TRL counts the tokens of training batches."""
        if tokens is None:
            return {}
        now = time.monotonic()
        speed = (tokens - self._tokens) / max(now - self._tokens_at, 1e-9)
        self._tokens, self._tokens_at = tokens, now
        return {"tokens_per_second": round(speed, 1)}

    def _status(self, state: Any, loss: float) -> TrainStatus:
        return TrainStatus(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=loss,
            learning_rate=self._learning_rate,
            steps_per_second=self.steps_per_second,
            seconds_left=(state.max_steps - state.global_step) / self.steps_per_second,
            eval_loss=self.eval_loss,
        )

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C asks for a stop after the step; the second is an ordinary KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)
            self.progress.note("Ctrl-C: stopping after this step (again: at once)")

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
