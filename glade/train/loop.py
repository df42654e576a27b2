"""The training loop: a budget, a step, and what is due after it. Knows nothing of folders or formats.

    until the budget is used up:  set the learning rate; take a step; log, evaluate, save what is due

A step is a function of (weights, optimiser, seed, step): the loop reads no clock to decide what a step computes, unless
the budget itself is minutes.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glade.data.loader import Batches
from glade.errors import GladeError
from glade.model.lm import LanguageModel
from glade.train.config import TrainSettings
from glade.train.loss import next_token_loss
from glade.train.resume import Progress
from glade.train.schedule import learning_rate_factor


class NonFiniteLoss(GladeError):
    """The loss or its gradient is nan or infinite; the optimiser has not moved."""


class StepResult(NamedTuple):
    loss: float  # nats a token, mean over the step
    grad_norm: float  # before clipping
    load_balance: float | None  # the mixture-of-experts loss that was added to the objective


@dataclass
class Budget:
    """How much of a run is used up, by steps, or by the clock when steps are not limited."""

    settings: TrainSettings
    before: float  # seconds of training before this process
    started: float  # time.monotonic() when this process started to train
    first_step: int  # of this process

    def left_s(self, step: int) -> float | None:
        """Seconds to go, at the pace of this process; None when there is no pace yet."""
        used, done = self.seconds() - self.before, self.share(step) - self._first_share()
        left = used * (1 - self.share(step)) / done if done > 0 else None
        if self.settings.minutes is None:
            return left
        limit = max(0.0, 60 * self.settings.minutes - self.seconds())
        return limit if left is None else min(left, limit)

    def _first_share(self) -> float:
        if self.settings.steps is not None:
            return self.first_step / self.settings.steps
        assert self.settings.minutes is not None
        return self.before / (60 * self.settings.minutes)

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def share(self, step: int) -> float:
        """In [0, 1], after `step` steps."""
        if self.settings.steps is not None:
            return min(1.0, step / self.settings.steps)
        assert self.settings.minutes is not None
        return min(1.0, self.seconds() / (60 * self.settings.minutes))

    def used_up(self, step: int) -> bool:
        minutes = self.settings.minutes
        return self.share(step) >= 1 or (minutes is not None and self.seconds() >= 60 * minutes)


class Due(Protocol):
    """What a run does along the way; the loop decides when."""

    def log(self, progress: Progress, result: StepResult, lr: float, share: float) -> None: ...

    def evaluate(self, progress: Progress) -> None: ...

    def save(self, progress: Progress) -> None: ...


@dataclass
class Trainer:
    """What takes a step. `forward` is the model, compiled or not."""

    model: LanguageModel
    forward: Callable[..., tuple[Tensor, object]]
    optimizer: torch.optim.Optimizer
    batches: Batches
    settings: TrainSettings
    precision: Callable[[], AbstractContextManager]
    peak_lr: float

    def run(self, progress: Progress, budget: Budget, due: Due) -> signal.Signals | None:
        """Train until the budget is used up, `stop_after` is reached, or a signal asks to stop (which is returned).

        What `progress` holds at the end is not yet evaluated or saved.

        Raises:
            NonFiniteLoss: at the first step whose loss or gradient is not finite.
        """
        settings = self.settings
        with stop_signals() as stopped:
            while not budget.used_up(progress.step) and progress.step != settings.stop_after:
                lr = self.set_learning_rate(budget, progress.step)
                result = self.step(progress.step)
                progress.step += 1
                progress.tokens += settings.batch_tokens
                progress.seconds = budget.seconds()
                share = budget.share(progress.step)
                if progress.step % settings.log_every == 0 or share >= 1:
                    due.log(progress, result, lr, share)
                if budget.used_up(progress.step):
                    return None
                if settings.eval_every and progress.step % settings.eval_every == 0:
                    due.evaluate(progress)
                elif settings.save_every and progress.step % settings.save_every == 0:
                    due.save(progress)
                if stopped.by is not None:
                    return stopped.by
        return None

    def set_learning_rate(self, budget: Budget, step: int) -> float:
        """For the step about to be taken: of `step + 1` steps of the budget, or of the minutes used so far."""
        s = self.settings
        share = (step + 1) / s.steps if s.steps is not None else max(budget.share(step), 1e-3)
        factor = learning_rate_factor(
            min(1.0, share), schedule=s.schedule, warmup=s.warmup, decay=s.decay, min_lr=s.min_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        return self.peak_lr * factor

    def step(self, step: int) -> StepResult:
        """One optimiser step on the batch of `step`, in `accumulate` forward and backward passes."""
        s = self.settings
        device = self.model.embed.weight.device
        loss = torch.zeros((), device=device)
        load_balance = None
        for part in range(s.accumulate):
            with self.precision():
                losses, state = self.forward(**self.inputs(step, part), return_state=False)
            objective = part_loss = next_token_loss(losses, s.batch_tokens)
            extra = getattr(state, "load_balance", None)
            if extra is not None:
                objective = objective + extra / s.accumulate
                load_balance = (load_balance or 0.0) + extra.item() / s.accumulate
            objective.backward()
            loss += part_loss.detach()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, s.clip or float("inf"))
        result = StepResult(loss.item(), norm.item(), load_balance)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteLoss(self._diagnosis(step, result))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def inputs(self, step: int, part: int) -> dict[str, Tensor | None]:
        """The tokens of one forward pass as the model takes them: rows where all segments are of one length."""
        batch = self.batches.batch(step, rank=part, world=self.settings.accumulate)
        device = self.model.embed.weight.device
        ids, targets = batch.ids.to(device), batch.targets.to(device)
        if batch.dense:
            shape = (-1, self.batches.context)
            return {"ids": ids.view(shape), "targets": targets.view(shape), "cu_seqlens": None}
        return {"ids": ids, "targets": targets, "cu_seqlens": batch.cu_seqlens.to(device)}

    def _diagnosis(self, step: int, result: StepResult) -> str:
        tokens = step * self.settings.batch_tokens
        what = "loss is" if not math.isfinite(result.loss) else "gradient norm is"
        value = result.loss if not math.isfinite(result.loss) else result.grad_norm
        gradients = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        self.optimizer.zero_grad(set_to_none=True)
        passes = (self.inputs(step, part) for part in range(self.settings.accumulate))
        place = next((p for x in passes if (p := first_non_finite(self.model, x, self.precision)) is not None), None)
        where = f"first in the output of {place}" if place else f"first in the gradient of {', '.join(gradients[-1:])}"
        return f"the {what} {value} at step {step + 1} (after {tokens:,} tokens), {where}; the optimiser has not moved"


@torch.no_grad()
def first_non_finite(
    model: nn.Module, inputs: dict[str, Tensor | None], precision: Callable[[], AbstractContextManager]
) -> str | None:
    """The innermost module whose output is the first that is not finite on these inputs; None if all are finite."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(x, Tensor) and not x.isfinite().all() for x in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with precision():
            model(**inputs, return_state=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def save_batch(batches: Batches, step: int, path: Path) -> None:
    """The tokens of a step as a safetensors file, to look at."""
    batch = batches.batch(step)
    save_file({"ids": batch.ids, "targets": batch.targets, "cu_seqlens": batch.cu_seqlens}, path)


class _Stopped:
    by: signal.Signals | None = None


@contextmanager
def stop_signals() -> Iterator[_Stopped]:
    """While inside, the first SIGINT or SIGTERM is noted, for the step to end and the run to be saved; a second SIGINT
    interrupts at once. Outside the main thread signals stay as they are."""
    stopped = _Stopped()

    def note(number: int, _frame: FrameType | None) -> None:
        if stopped.by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.by = signal.Signals(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield stopped
        return
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
