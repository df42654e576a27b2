"""The training loop: a budget, a step, and what is due after it. Knows nothing of folders, formats or losses.

    until the budget is used up:  set the learning rate; take a step; log, evaluate, save what is due

Nothing of a step is read back from the device until something is due, so that the device never waits for the next one.
A loss or gradient that is not finite holds the optimiser on the device, in that step and all after it; when the steps
are read, the run goes back to it.

What is minimised is an `Objective`: pretraining, fine-tuning and preference are three of them. A step is a function of
(weights, optimiser, seed, step): the loop reads no clock to decide what a step computes, unless the budget itself is
minutes.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from glade.errors import GladeError
from glade.model.lm import LanguageModel
from glade.ops.linear_attention import recomputing
from glade.train.config import LoopSettings
from glade.train.optim import clip_in_step
from glade.train.resume import Progress
from glade.train.schedule import learning_rate_factor


class NonFiniteLoss(GladeError):
    """The loss or its gradient is nan or infinite; the optimiser has not moved."""


class Pass(NamedTuple):
    """One forward pass of a step; the passes of a step add up to it."""

    loss: Tensor  # its share of the step's mean loss, to be differentiated
    num_tokens: int  # that the model read
    load_balance: Tensor | None = None  # the mixture-of-experts loss to add
    metrics: Mapping[str, Tensor] = MappingProxyType({})  # shares of the step's means, to be logged


class Objective(Protocol):
    """What a run minimises, over which examples. Everything is a pure function of the weights and the step."""

    def forward(self, step: int, part: int) -> Pass:
        """Pass number `part` of the `accumulate` that make up a step."""
        ...

    def batch(self, step: int) -> dict[str, Tensor]:
        """The tokens of a step, to look at."""
        ...


class Taken(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    num_tokens: int
    load_balance: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the step
    grad_norm: float  # before clipping
    num_tokens: int  # read
    load_balance: float | None  # the mixture-of-experts loss that was added to the objective
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Budget:
    """How much of a run is used up, by steps, or by the clock when steps are not limited."""

    steps: int | None  # optimiser steps in all; None: minutes are the budget
    minutes: float | None  # the limit of the clock; None: there is none
    before: float  # seconds of training before this process
    started: float  # time.monotonic() when this process started to train
    first_step: int  # of this process

    def left_s(self, step: int) -> float | None:
        """Seconds to go, at the pace of this process; None when there is no pace yet."""
        used, done = self.seconds() - self.before, self.share(step) - self._first_share()
        left = used * (1 - self.share(step)) / done if done > 0 else None
        if self.minutes is None:
            return left
        limit = max(0.0, 60 * self.minutes - self.seconds())
        return limit if left is None else min(left, limit)

    def _first_share(self) -> float:
        if self.steps is not None:
            return self.first_step / self.steps
        assert self.minutes is not None
        return self.before / (60 * self.minutes)

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def share(self, step: int) -> float:
        """In [0, 1], after `step` steps."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, self.seconds() / (60 * self.minutes))

    def used_up(self, step: int) -> bool:
        return self.share(step) >= 1 or (self.minutes is not None and self.seconds() >= 60 * self.minutes)


class Due(Protocol):
    """What a run does along the way; the loop decides when."""

    def log(self, progress: Progress, result: StepResult, lr: float, share: float) -> None: ...

    def evaluate(self, progress: Progress) -> None: ...

    def save(self, progress: Progress) -> None: ...


@dataclass
class Trainer:
    """What takes a step."""

    model: LanguageModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    settings: LoopSettings
    precision: Callable[[], AbstractContextManager]
    peak_lr: float
    held: Tensor | None = field(default=None, init=False)  # 1 once something was not finite: the optimiser stays

    def run(self, progress: Progress, budget: Budget, due: Due) -> signal.Signals | None:
        """Train until the budget is used up, `stop_after` is reached, or a signal asks to stop (which is returned).

        What `progress` holds at the end is not yet evaluated or saved.

        Raises:
            NonFiniteLoss: at the first step whose loss or gradient is not finite.
        """
        s, unread = self.settings, []
        with stop_signals() as stopped:
            while not budget.used_up(progress.step) and progress.step != s.stop_after:
                lr = self.set_learning_rate(budget, progress.step)
                unread.append(self._take(progress.step))
                progress.step += 1
                progress.tokens += unread[-1].num_tokens
                share, used_up, signalled = budget.share(progress.step), budget.used_up(progress.step), stopped.by
                logs = progress.step % s.log_every == 0 or share >= 1
                evaluates = bool(s.eval_every) and progress.step % s.eval_every == 0
                saves = bool(s.save_every) and progress.step % s.save_every == 0
                ends = used_up or signalled is not None or progress.step == s.stop_after
                if logs or evaluates or saves or ends:
                    result = self._read(unread, progress)
                    unread.clear()
                    progress.seconds = budget.seconds()
                    if logs:
                        due.log(progress, result, lr, share)
                if used_up:
                    return None
                if evaluates:
                    due.evaluate(progress)
                elif saves:
                    due.save(progress)
                if signalled is not None:
                    return signalled
        return None

    def set_learning_rate(self, budget: Budget, step: int) -> float:
        """For the step about to be taken: of `step + 1` steps of the budget, or of the minutes used so far."""
        s = self.settings
        share = (step + 1) / budget.steps if budget.steps is not None else max(budget.share(step), 1e-3)
        factor = learning_rate_factor(
            min(1.0, share), schedule=s.schedule, warmup=s.warmup, decay=s.decay, min_lr=s.min_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        return self.peak_lr * factor

    def step(self, step: int) -> StepResult:
        """One optimiser step on the examples of `step`, in `accumulate` forward and backward passes."""
        return self._read([self._take(step)], None)

    def _take(self, step: int) -> Taken:
        """The same, not read back."""
        passes = [self._backward(step, part) for part in range(self.settings.accumulate)]
        norm = clip_in_step(self.optimizer, self.model.parameters(), self.settings.clip)
        taken = _taken(step, passes, norm)
        broken = (~(taken.loss.isfinite() & norm.isfinite())).float()
        self.held = broken if self.held is None else torch.maximum(self.held, broken)
        # what fused optimisers are told by a gradient scaler: with 1 they leave weights and state as they are
        self.optimizer.found_inf = self.held  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def _read(self, unread: Sequence[Taken], progress: Progress | None) -> StepResult:
        """The last of some steps, after a look at all of them.

        Raises:
            NonFiniteLoss: one was not finite; `progress` is where it was before that.
        """
        numbers = torch.stack([torch.stack([x.loss.float(), x.grad_norm.float()]) for x in unread]).tolist()
        for i, (loss, norm) in enumerate(numbers):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.held = None
                if progress is not None:
                    progress.step = unread[i].step
                    progress.tokens -= sum(x.num_tokens for x in unread[i:])
                raise NonFiniteLoss(self._diagnosis(unread[i].step, loss, norm))
        last, (loss, norm) = unread[-1], numbers[-1]
        balance = None if last.load_balance is None else last.load_balance.item()
        metrics = {name: x.item() for name, x in last.metrics.items()}
        return StepResult(loss, norm, last.num_tokens, balance, metrics)

    def _backward(self, step: int, part: int) -> Pass:
        """The gradients of one pass, added to those of the step; the pass without its graph."""
        with self.precision(), recompute(self.model, self.settings.recompute):
            done = self.objective.forward(step, part)
        objective, balance = done.loss, done.load_balance
        if balance is not None:
            balance = balance / self.settings.accumulate
            objective = objective + balance
        objective.backward()
        return done._replace(loss=done.loss.detach(), load_balance=None if balance is None else balance.detach())

    def _diagnosis(self, step: int, loss: float, norm: float) -> str:
        what, value = ("gradient norm is", norm) if math.isfinite(loss) else ("loss is", loss)
        for part in range(self.settings.accumulate):
            self._backward(step, part)
        gradients = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        self.optimizer.zero_grad(set_to_none=True)
        place = self._first_non_finite(step)
        where = f"first in the output of {place}" if place else f"first in the gradient of {', '.join(gradients[-1:])}"
        return f"the {what} {value} at step {step + 1}, {where}; the optimiser has not moved"

    @torch.no_grad()
    def _first_non_finite(self, step: int) -> str | None:
        """The innermost module whose output is the first that is not finite in `step`; None if all are finite."""
        # a compiled model would not notice the hooks
        with torch.compiler.set_stance("force_eager"), watched(self.model) as found, self.precision():
            for part in range(self.settings.accumulate):
                self.objective.forward(step, part)
        return found[0] if found else None


@contextmanager
def recompute(model: LanguageModel, what: str) -> Iterator[None]:
    """While inside, forward passes keep for the backward what `train.recompute` says, and no more."""
    before, model.recompute_layers = model.recompute_layers, what == "layer"
    try:
        with recomputing(what == "op"):
            yield
    finally:
        model.recompute_layers = before


def _taken(step: int, passes: list[Pass], norm: Tensor) -> Taken:
    balances = [p.load_balance for p in passes if p.load_balance is not None]
    return Taken(
        step,
        loss=_sum([p.loss for p in passes]),
        grad_norm=norm,
        num_tokens=sum(p.num_tokens for p in passes),
        load_balance=_sum(balances) if balances else None,
        metrics={name: _sum([p.metrics[name] for p in passes]) for name in passes[0].metrics},
    )


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """While inside, the innermost module whose output is the first that is not finite is named in the list."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(x, Tensor) and not x.isfinite().all() for x in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


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
