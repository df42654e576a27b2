"""A run: one kind of training (a `Task`) in its folder, from its start or its last checkpoint until it ends.

What every kind shares is here: the loop, the log, evaluations, checkpoints, samples, results.json. What is trained, on
what, and how that is judged is the task's: `pretrain`, `sft` and `dpo` each are one.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from glade import __version__
from glade import config as settings
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError
from glade.infer.config import SamplingParams
from glade.infer.samples import sample_ids
from glade.model.atomic import write_file_atomically
from glade.model.lm import LanguageModel
from glade.train.curves import draw_curves
from glade.train.log import Log, stdout
from glade.train.loop import Budget, NonFiniteLoss, Objective, StepResult, Trainer
from glade.train.memory import keep_freed_memory
from glade.train.optim import build_optimizer
from glade.train.passes import Direct, Passes, Recorded, why_not_recorded
from glade.train.resume import Checkpoints, Progress, write_config

SECONDS_BETWEEN_PICTURES = 20


class Heldout(Protocol):
    """What an evaluation on held-out examples came to."""

    @property
    def loss(self) -> float: ...

    def to_dict(self) -> dict[str, float | int]:
        """The measures by name, for results.json."""
        ...


class Task(Protocol):
    """A kind of training: what it trains, on what, and how that is judged."""

    config: Any  # resolved: what config.yaml will hold
    folder: Path
    device: torch.device
    tokenizer: Tokenizer
    model: LanguageModel  # with its first weights, on the device
    steps: int | None  # the budget; None: `minutes` are
    minutes: float | None  # the limit of the clock
    peak_lr: float
    baseline: bool  # judge the model before the first step too, as what the others are compared with

    def objective(self, passes: Passes) -> Objective:
        """What is minimised, by forward passes of the model."""
        ...

    def evaluate(self, *, whole: bool) -> Heldout | None:
        """Judge the model on what is held out, on all of it if `whole`; None if nothing is."""
        ...

    def rank(self, heldout: Any) -> list[float]:
        """What `checkpoints/best` is chosen by: lower is better, and the first number that differs decides."""
        ...

    def row(self, heldout: Any) -> dict[str, float | int]:
        """The measures that go into metrics.jsonl and into the curves."""
        ...

    def told(self, heldout: Any) -> str:
        """The same in words, a line."""
        ...

    def described(self) -> list[str]:
        """What is trained on what, in lines."""
        ...

    def prompt(self) -> Sequence[int]:
        """The ids that the samples continue where no prompt is set."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What the checkpoint's training_metadata.json says of the data."""
        ...

    def data(self) -> dict[str, Any]:
        """The section `data` of results.json."""
        ...


@dataclass(frozen=True)
class Results:
    """What a run came to; `results.json` holds the same."""

    run: Path
    checkpoint: Path  # checkpoints/best if the run evaluated, else checkpoints/last
    progress: Progress
    heldout: Any  # over everything held out at the end; None if the run was stopped before, or nothing is held out
    sample: str
    stopped: signal.Signals | None
    finished: bool  # the budget is used up


class Run:
    """One run: everything that stays the same while it trains, and what is done along the way."""

    def __init__(self, task: Task) -> None:
        self.task, self.config, self.folder, self.model = task, task.config, task.folder, task.model
        train = self.config.train
        self.optimizer = build_optimizer(self.model, train, task.peak_lr)
        self.checkpoints = Checkpoints(self.folder, train.keep)
        self.passes = self._passes()
        resume = self.config.resume
        self.progress = self.checkpoints.restore(self.model, self.optimizer) if resume else Progress()
        self.trainer = Trainer(
            model=self.model,
            objective=task.objective(self.passes),
            optimizer=self.optimizer,
            settings=train,
            precision=precision_context(train.precision, task.device),
            peak_lr=task.peak_lr,
        )
        self.heldout: Heldout | None = None
        self.saved_step = self.progress.step if resume else -1
        self.sample = ""
        self.drawn = time.monotonic()

    def _passes(self) -> Passes:
        """How forward passes run.

        Raises:
            ConfigError: they are to be recorded, and cannot be.
        """
        train, device = self.config.train, self.task.device
        model = torch.compile(self.model) if train.compile else self.model
        if train.cuda_graphs == "off":
            return Direct(model, device)
        refusal = why_not_recorded(self.model, uses_bf16(train.precision, device))
        if device.type != "cuda":
            refusal = f"the device is {device.type}"
        elif train.compile:
            refusal = "train.compile is on"
        elif train.recompute == "layer":
            refusal = "train.recompute=layer reads the state of the random numbers"
        if refusal is None:
            return Recorded(self.model, device)
        if train.cuda_graphs == "on":
            raise ConfigError(f"train.cuda_graphs is on, but {refusal}; leave it at auto")
        return Direct(model, device)

    def run(self) -> Results:
        """Train until the budget is used up or the run is told to stop.

        Raises:
            NonFiniteLoss: the loss is not finite; the last good weights are saved.
        """
        config, progress = self.config, self.progress
        if self.task.device.type == "cpu":
            keep_freed_memory()
        write_config(self.folder, replace(config, resume=False))
        with Log(
            self.folder,
            config=settings.to_dict(config),
            resumed_step=progress.step if config.resume else None,
            wandb=config.train.wandb,
            tensorboard=config.train.tensorboard,
        ) as self.out:
            self._say_what_is_trained()
            self.budget = Budget(
                self.task.steps, self.task.minutes, progress.seconds, time.monotonic(), first_step=progress.step
            )
            if self.task.baseline and progress.step == 0:
                self.judge(progress)
            self.window = (time.monotonic(), progress.tokens)
            try:
                stopped = self.trainer.run(progress, self.budget, self)
            except NonFiniteLoss as error:
                raise self._give_up(error) from None
            finished = stopped is None and self.budget.used_up(progress.step)
            if finished:
                self.evaluate(progress, whole=True)
            elif self.saved_step != progress.step:
                self.save(progress)
        draw_curves(self.folder)
        self._write_results()
        best = self.folder / "checkpoints" / "best"
        checkpoint = best if best.exists() else self.folder / "checkpoints" / "last"
        heldout = self.heldout if finished else None
        return Results(self.folder, checkpoint, progress, heldout, self.sample, stopped, finished)

    # --- what the loop asks for ---

    def log(self, progress: Progress, result: StepResult, lr: float, share: float) -> None:
        now, (then, tokens) = time.monotonic(), self.window
        rate = (progress.tokens - tokens) / max(now - then, 1e-9)
        self.window = (now, progress.tokens)
        row = _moment(progress) | {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": round(rate, 1),
            **result.metrics,
        }
        if result.load_balance is not None:
            row["load_balance"] = result.load_balance
        self.out.row(row)
        text = f"step {progress.step}  loss {result.loss:.4f}  {rate:,.0f} tokens/s"
        self.out.progress(share, text, self.budget.left_s(progress.step))

    def evaluate(self, progress: Progress, whole: bool = False) -> None:
        """Judge the model on what is held out (all of it if `whole`), write a sample, and save."""
        rank = self.judge(progress, whole)
        best = rank is not None and rank < progress.best
        if rank is not None and best:
            progress.best, progress.best_step = rank, progress.step
        if self.config.train.sample_tokens:
            self._write_sample(progress)
        self.save(progress, best=best)
        # a picture takes a second or two; the last one is drawn when the run ends
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES:
            draw_curves(self.folder)
            self.drawn = time.monotonic()
        self.window = (time.monotonic(), progress.tokens)

    def judge(self, progress: Progress, whole: bool = False) -> list[float] | None:
        """The rank of the model by what is held out, after it has been told and logged; None if nothing is."""
        heldout = self.task.evaluate(whole=whole)
        if heldout is None:
            return None
        self.heldout = heldout
        row = {f"heldout_{name}": value for name, value in self.task.row(heldout).items()}
        self.out.row(_moment(progress) | row)
        self.out.say(f"step {progress.step}: {self.task.told(heldout)}")
        return self.task.rank(heldout)

    def save(self, progress: Progress, best: bool = False) -> None:
        """Write a checkpoint of this moment."""
        progress.seconds = self.budget.seconds()
        metadata = self._metadata()
        self.checkpoints.save(self.model, self.task.tokenizer, self.optimizer, progress, metadata, best=best)
        self.saved_step = progress.step

    # --- what is written ---

    def _metadata(self) -> dict[str, Any]:
        return {
            "glade_version": __version__,
            "torch_version": torch.__version__,
            "seed": self.config.seed,
            **self.task.metadata(),
            "train": asdict(self.config.train),
            "step": self.progress.step,
            "trained_tokens": self.progress.tokens,
            "heldout": None if self.heldout is None else self.heldout.to_dict(),
        }

    def _write_sample(self, progress: Progress) -> None:
        train, tokenizer = self.config.train, self.task.tokenizer
        prompt = self.task.prompt() if train.prompt is None else tokenizer.prompt(train.prompt)
        params = SamplingParams(max_new_tokens=train.sample_tokens, temperature=0.8, top_p=0.95, seed=self.config.seed)
        (answer,) = sample_ids(self.model, tokenizer, [prompt], params)
        # special tokens that a chat template has written are part of what is shown, but not the BOS
        shown = list(prompt[1:] if prompt[0] == tokenizer.bos_id else prompt)
        self.sample = tokenizer.model.decode(shown, skip_special_tokens=False) + answer.text
        with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== step {progress.step}, {progress.tokens:,} tokens ===\n{self.sample}\n\n")

    def _write_results(self) -> None:
        model, progress = self.model, self.progress
        results = {
            "run": str(self.folder),
            "model": {
                "mixer": model.config.mixer,
                "layers": list(model.config.layer_mixers),
                "parameters": model.num_parameters(),
                "parameters_without_embeddings": model.num_parameters(embeddings=False),
            },
            "data": self.task.data(),
            "results": asdict(progress)
            | {
                "best": progress.best if all(map(math.isfinite, progress.best)) else None,
                "tokens_per_s": progress.tokens / progress.seconds if progress.seconds else None,
                "heldout": None if self.heldout is None else self.heldout.to_dict(),
                "device": _device_name(self.task.device),
                "threads": torch.get_num_threads(),
            },
            "config": settings.to_dict(self.config),
        }
        context = results["data"]["context"]
        results["model"] |= {
            "flops_per_token": model.flops_per_token(context),
            "state_bytes": model.state_bytes(context),
        }
        content = json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n"
        write_file_atomically(self.folder / "results.json", content.encode("utf-8"))

    def _say_what_is_trained(self) -> None:
        m = self.model
        products = "bf16" if uses_bf16(self.config.train.precision, self.task.device) else "fp32"
        recorded = ", passes recorded as CUDA graphs" if isinstance(self.passes, Recorded) else ""
        self.out.say(f"run {self.folder}  on {_device_name(self.task.device)}, {products} matrix products{recorded}")
        self.out.say(
            f"model {' '.join(dict.fromkeys(m.config.layer_mixers))}, {m.num_parameters():,} parameters "
            f"({m.num_parameters(embeddings=False):,} without embeddings)"
        )
        for line in self.task.described():
            self.out.say(line)
        if self.config.resume:
            self.out.say(f"resumed at step {self.progress.step}")

    def _give_up(self, error: NonFiniteLoss) -> NonFiniteLoss:
        """Keep the weights of the last good step and the batch; the message says where they are and what to try."""
        if self.saved_step != self.progress.step:
            self.save(self.progress)
        step = self.progress.step
        batch = self.folder / f"non-finite-step-{step + 1}.safetensors"
        save_file(self.trainer.objective.batch(step), batch)
        return NonFiniteLoss(
            f"{error}. The weights of step {step} are in {self.folder / 'checkpoints' / 'last'}, the "
            f"tokens in {batch}. Lower train.lr (its peak is {self.trainer.peak_lr:.2g}) or train.clip, or set "
            f"train.precision=fp32, and go on with --resume"
        )


def report(results: Results, verb: str, told: Sequence[str]) -> None:
    """What a verb answers when its run has ended: the sample, what is `told` of it, and where everything is.

    Raises:
        SystemExit: a signal stopped the run.
    """
    progress = results.progress
    lines = ["", results.sample.rstrip(), ""] if results.sample else []
    lines += [
        *told,
        f"{progress.step} steps, {progress.tokens:,} tokens in {progress.seconds:.0f} s",
        f"checkpoint  {results.checkpoint}",
        f"curves      {results.run / 'curves.png'}",
    ]
    if results.finished:
        lines.append(f"go on with  glade generate {results.run} --prompt=...")
    else:
        lines.append(f"stopped; go on with  glade {verb} --run={results.run} --resume")
    stdout("\n".join(lines))
    if results.stopped:
        raise SystemExit(128 + results.stopped)


def _moment(progress: Progress) -> dict[str, Any]:
    return {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bf16: as asked, or for "auto" where the device has instructions for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))


def precision_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What to enter around each forward pass."""
    if not uses_bf16(precision, device):
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
