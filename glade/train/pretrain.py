"""From text to a trained model: `train(config)`, and the verb `glade train`.

Puts together what others know: the corpus (`glade.data`), the model (`glade.model`), the loop, the folder, the log.
"""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glade import __version__
from glade import config as settings
from glade.data.loader import Batches, heldout_batches
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError
from glade.evals.perplexity import Perplexity, heldout_batch_tokens, perplexity
from glade.infer.generate import generate
from glade.interop.load import find_device
from glade.model.atomic import write_file_atomically
from glade.train.config import TrainRun
from glade.train.curves import draw_curves
from glade.train.log import Log, stdout
from glade.train.loop import Budget, NonFiniteLoss, StepResult, Trainer, save_batch
from glade.train.optim import build_optimizer, peak_learning_rate
from glade.train.resume import Checkpoints, Progress, open_run, write_config
from glade.train.start import starting_model


@dataclass(frozen=True)
class Results:
    """What a run came to; `results.json` holds the same."""

    run: Path
    checkpoint: Path  # checkpoints/best if the run evaluated, else checkpoints/last
    progress: Progress
    heldout: Perplexity | None  # over the whole held-out text at the end; None if the run was stopped before
    sample: str
    stopped: signal.Signals | None


def train(config: TrainRun) -> Results:
    """Train as `config` says, in its run folder; returns when the budget is used up or the run is told to stop.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, with nothing written.
        NonFiniteLoss: the loss is not finite; the last good weights are saved.
    """
    return _Pretraining(config).run()


def run(config: TrainRun) -> None:
    """The verb `glade train`: train, and say where everything is."""
    results = train(config)
    progress = results.progress
    lines = []
    if results.sample:
        lines += ["", results.sample.rstrip(), ""]
    if results.heldout is not None:
        h = results.heldout.to_dict()
        lines.append(
            f"held-out loss {h['loss']:.4f} nats a token (perplexity {h['perplexity']:.3f}, "
            f"{h['bits_per_byte']:.4f} bits a byte, word perplexity {h['word_perplexity']:.1f}, "
            f"next-token accuracy {100 * h['accuracy']:.1f} %)"
        )
    lines += [
        f"{progress.step} steps, {progress.tokens:,} tokens in {progress.seconds:.0f} s",
        f"checkpoint  {results.checkpoint}",
        f"curves      {results.run / 'curves.png'}",
        f"go on with  glade generate {results.run} --prompt=...",
    ]
    if results.stopped or results.heldout is None:
        lines[-1] = f"stopped; go on with  glade train --run={results.run} --resume"
    stdout("\n".join(lines))
    if results.stopped:
        raise SystemExit(128 + results.stopped)


class _Pretraining:
    """One run: everything that stays the same while it trains, and what is done along the way."""

    def __init__(self, config: TrainRun) -> None:
        self.folder = open_run(config)
        self.device = find_device(config.device)
        self.data = config.data.prepare(config.seed)
        self.tokenizer = self.data.tokenizer
        model = replace(config.model, vocab_size=_vocab_size(config, self.tokenizer)).resolve()
        self.config = replace(config, run=str(self.folder), model=model)
        torch.manual_seed(config.seed)
        self.model, self.copied = starting_model(self.config, self.folder, self.tokenizer)
        self.model.to(self.device).train()
        peak_lr = peak_learning_rate(config.train, model.dim)
        self.optimizer = build_optimizer(self.model, config.train, peak_lr)
        self.checkpoints = Checkpoints(self.folder, config.train.keep)
        self.progress = self.checkpoints.restore(self.model, self.optimizer) if config.resume else Progress()
        self.precision = precision_context(config.train.precision, self.device)
        self.trainer = Trainer(
            model=self.model,
            forward=torch.compile(self.model) if config.train.compile else self.model,
            optimizer=self.optimizer,
            batches=Batches(
                self.data.mixture, context=config.data.context, batch_tokens=config.train.batch_tokens, seed=config.seed
            ),
            settings=config.train,
            precision=self.precision,
            peak_lr=peak_lr,
        )
        self.heldout: Perplexity | None = None
        self.saved_step = self.progress.step if config.resume else -1
        self.sample = ""
        self.window = (time.monotonic(), self.progress.tokens)

    def run(self) -> Results:
        config = self.config
        write_config(self.folder, replace(config, resume=False))
        resumed = self.progress.step if config.resume else None
        with Log(
            self.folder,
            config=settings.to_dict(config),
            resumed_step=resumed,
            wandb=config.train.wandb,
            tensorboard=config.train.tensorboard,
        ) as self.out:
            self._say_what_is_trained()
            self.budget = Budget(config.train, self.progress.seconds, time.monotonic(), self.progress.step)
            self.window = (time.monotonic(), self.progress.tokens)
            try:
                stopped = self.trainer.run(self.progress, self.budget, self)
            except NonFiniteLoss as error:
                raise self._give_up(error) from None
            whole = stopped is None and self.budget.used_up(self.progress.step)
            if whole:
                self.evaluate(self.progress, whole=True)
            elif self.saved_step != self.progress.step:
                self.save(self.progress)
        draw_curves(self.folder)
        self._write_results()
        best = self.folder / "checkpoints" / "best"
        checkpoint = best if best.exists() else self.folder / "checkpoints" / "last"
        return Results(self.folder, checkpoint, self.progress, self.heldout if whole else None, self.sample, stopped)

    # --- what the loop asks for ---

    def log(self, progress: Progress, result: StepResult, lr: float, share: float) -> None:
        now, (then, tokens) = time.monotonic(), self.window
        rate = (progress.tokens - tokens) / max(now - then, 1e-9)
        self.window = (now, progress.tokens)
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": round(rate, 1),
        }
        if result.load_balance is not None:
            row["load_balance"] = result.load_balance
        self.out.row(row)
        text = f"step {progress.step}  loss {result.loss:.4f}  {rate:,.0f} tokens/s"
        self.out.progress(share, text, self.budget.left_s(progress.step))

    def evaluate(self, progress: Progress, whole: bool = False) -> None:
        """Score held-out text (all of it if `whole`), write a sample, and save."""
        train, context = self.config.train, self.config.data.context
        batch_tokens = heldout_batch_tokens(context, train.batch_tokens, self.model.config.vocab_rows)
        limit = None if whole else train.eval_tokens
        batches = heldout_batches(self.data.heldout, context=context, batch_tokens=batch_tokens, max_tokens=limit)
        self.heldout = perplexity(self.model, batches, precision=self.precision())
        h = self.heldout.to_dict()
        names = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "accuracy", "tokens")
        self.out.row(
            {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
            | {f"heldout_{name}": h[name] for name in names}
        )
        self.out.say(
            f"step {progress.step}: held-out loss {h['loss']:.4f}, perplexity {h['perplexity']:.3f}, "
            f"{h['bits_per_byte']:.4f} bits a byte, accuracy {100 * h['accuracy']:.1f} %"
        )
        if train.sample_tokens:
            self._write_sample(progress)
        best = self.heldout.loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_step = self.heldout.loss, progress.step
        self.save(progress, best=best)
        draw_curves(self.folder)
        self.window = (time.monotonic(), progress.tokens)

    def save(self, progress: Progress, best: bool = False) -> None:
        """Write a checkpoint of this moment."""
        progress.seconds = self.budget.seconds()
        metadata = self._metadata()
        self.checkpoints.save(self.model, self.tokenizer, self.optimizer, progress, metadata, best=best)
        self.saved_step = progress.step

    # --- what is written ---

    def _metadata(self) -> dict[str, Any]:
        return {
            "glade_version": __version__,
            "torch_version": torch.__version__,
            "seed": self.config.seed,
            "corpus": self.config.data.corpus,
            "credit": "\n".join(self.data.info["credits"]),
            "context": self.config.data.context,
            "train": asdict(self.config.train),
            "step": self.progress.step,
            "trained_tokens": self.progress.tokens,
            "heldout": None if self.heldout is None else self.heldout.to_dict(),
        }

    def _write_sample(self, progress: Progress) -> None:
        prompt = self.config.train.prompt
        if prompt is None:
            prompt = self._heldout_start()
        text = generate(
            self.model,
            prompt,
            tokenizer=self.tokenizer,
            max_new_tokens=self.config.train.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=self.config.seed,
        )
        self.sample = f"{prompt}{text}"
        with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== step {progress.step}, {progress.tokens:,} tokens ===\n{self.sample}\n\n")

    def _heldout_start(self) -> str:
        """The first words of a held-out document, up to the end of a line."""
        ids = self.data.heldout.document(0)[1:65].tolist()
        text = self.tokenizer.decode([i for i in ids if i != self.tokenizer.eos_id])
        return text.split("\n", 1)[0][:64]

    def _write_results(self) -> None:
        model, progress = self.model, self.progress
        results = {
            "run": str(self.folder),
            "model": {
                "mixer": self.config.model.mixer,
                "layers": list(model.config.layer_mixers),
                "parameters": model.num_parameters(),
                "parameters_without_embeddings": model.num_parameters(embeddings=False),
                "flops_per_token": model.flops_per_token(self.config.data.context),
                "state_bytes": model.state_bytes(self.config.data.context),
            },
            "data": {
                "corpus": self.config.data.corpus,
                "tokenizer": self.config.data.tokenizer,
                "vocab_size": self.tokenizer.vocab_size,
                "train_tokens": self.data.train.num_tokens,
                "heldout_tokens": self.data.heldout.num_tokens,
            },
            "results": asdict(progress)
            | {
                "best_loss": progress.best_loss if math.isfinite(progress.best_loss) else None,
                "tokens_per_s": progress.tokens / progress.seconds if progress.seconds else None,
                "heldout": None if self.heldout is None else self.heldout.to_dict(),
                "device": _device_name(self.device),
                "threads": torch.get_num_threads(),
            },
            "config": settings.to_dict(self.config),
        }
        content = json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n"
        write_file_atomically(self.folder / "results.json", content.encode("utf-8"))

    def _say_what_is_trained(self) -> None:
        m, d = self.model, self.data
        self.out.say(f"run {self.folder}  on {_device_name(self.device)}, {self.precision_name} matrix products")
        self.out.say(
            f"model {' '.join(dict.fromkeys(m.config.layer_mixers))}, {m.num_parameters():,} parameters "
            f"({m.num_parameters(embeddings=False):,} without embeddings)"
        )
        self.out.say(
            f"text {self.config.data.corpus}: {d.train.num_tokens:,} tokens to train on, "
            f"{d.heldout.num_tokens:,} held out, vocabulary {self.tokenizer.vocab_size:,}"
        )
        if self.copied:
            self.out.say(self.copied)
        if self.config.resume:
            self.out.say(f"resumed at step {self.progress.step}")

    @property
    def precision_name(self) -> str:
        return "bf16" if uses_bf16(self.config.train.precision, self.device) else "fp32"

    def _give_up(self, error: NonFiniteLoss) -> NonFiniteLoss:
        """Keep the weights of the last good step and the batch; the message says where they are and what to try."""
        if self.saved_step != self.progress.step:
            self.save(self.progress)
        batch = self.folder / f"non-finite-step-{self.progress.step + 1}.safetensors"
        save_batch(self.trainer.batches, self.progress.step, batch)
        return NonFiniteLoss(
            f"{error}. The weights of step {self.progress.step} are in {self.folder / 'checkpoints' / 'last'}, the "
            f"tokens in {batch}. Lower train.lr (its peak is {self.trainer.peak_lr:.2g}) or train.clip, or set "
            f"train.precision=fp32, and go on with --resume"
        )


def _vocab_size(config: TrainRun, tokenizer: Tokenizer) -> int:
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {wanted}, the tokenizer has {tokenizer.vocab_size} ids; leave model.vocab_size out"
        )
    return wanted or tokenizer.vocab_size


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
