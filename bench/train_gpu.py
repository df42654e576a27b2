"""A whole training step on one GPU: glade's models, and flash-linear-attention's of the same shape.

    python bench/train_gpu.py                                          # GDN, GLA, GDN-2 and KDA, 24 layers of 1024
    python bench/train_gpu.py --mixers gdn --contenders glade fla --profile
    python bench/train_gpu.py --mixers gdn2 --contenders glade "glade op" "glade layer"    # recompute in the backward
    python bench/train_gpu.py --out bench/results/train_h200.csv

24 layers of width 1024, SwiGLU of 2,816, vocabulary 32,000, untied head; GDN, KDA and GDN-2 with 8 heads of 128, GLA
with 4 heads of 128 for keys and 256 for values. A step is forward, backward, clipping, fused AdamW, under bf16
autocast with fp32 weights, uncompiled; nothing waits for the device but the end of a turn. `glade` is as `glade train`
runs it, its passes recorded as CUDA graphs; `glade eager` starts kernel by kernel, as do `glade op` and `glade layer`.
All contenders live in one process and take turns of a few steps; times are those between CUDA events. FLA's models are
its own classes (its GDN-2 is its KDA model with its GDN-2 layers), with fused norms, fused SwiGLU and its fused linear
cross-entropy. Parameters agree within 2 %.

FLA 0.6.0 refuses gated products with a scalar decay on Hopper with Triton 3.4 to 3.7.0, since their gradients are
wrong there unless TileLang is installed. `--lift-refusal` times them nevertheless; such rows are called "fla, refusal
lifted".
"""

import argparse
import csv
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glade.model import LanguageModel, ModelConfig
from glade.ops.linear_attention import recomputing
from glade.train.config import TrainSettings
from glade.train.examples import Row
from glade.train.loss import token_losses
from glade.train.optim import build_optimizer, clip_in_step
from glade.train.passes import Direct, Recorded, sent

COLUMNS = ["mixer", "contender", "shape", "parameters", "device", "versions", "tokens_per_s", "median_ms", "p20_ms"]
COLUMNS += ["p80_ms", "launch_ms", "peak_gib", "share_of_peak", "first_step_s", "loss", "command"]
LAYERS, DIM, HIDDEN, VOCAB, EPS = 24, 1024, 2816, 32_000, 1e-6
HEADS: dict[str, dict[str, Any]] = {
    "gdn": {"num_heads": 8, "head_dim": 128, "head_dim_v": 128},
    "kda": {"num_heads": 8, "head_dim": 128, "head_dim_v": 128},
    "gdn2": {"num_heads": 8, "head_dim": 128, "head_dim_v": 128},
    "gla": {"num_heads": 4, "head_dim": 128, "head_dim_v": 256},
}
# parts of a step by what stands in the name of a kernel; the first that fits
PARTS = {
    "recurrence": (
        "states_kernel",
        "scalar_keys",
        "scalar_prepare",
        "prepare_kernel",
        "keys_backward",
        "vector_keys",
        "values_backward",
    ),
    "short convolution": ("short_conv", "final_state_kernel", "state_backward_kernel"),
    "norms": ("rms_norm",),
    "SwiGLU": ("swiglu",),
    "decays and gates": ("log_decay", "sigmoid"),
    "cross-entropy": ("losses_kernel", "gradients_kernel"),
    "sums over programs": ("sum_kernel",),
    "copies and casts": ("copy_kernel", "CopyFunctor", "Memcpy", "Memset", "bfloat16_copy", "FillFunctor"),
    "optimiser and clipping": ("multi_tensor", "FusedAdam", "fused_adam"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitK"),
    "concatenation": ("CatArray",),
}
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Contender:
    name: str
    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    device: torch.device
    first_step_s: float = 0.0
    peak_bytes: int = 0
    step_ms: list[float] = field(default_factory=list)
    launch_ms: list[float] = field(default_factory=list)
    last_loss: float = math.nan

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(ids, targets)
        loss.backward()
        clip_in_step(self.optimizer, self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def first_step(self, ids: Tensor, targets: Tensor) -> None:
        """Compiles what is compiled, then measures the memory of a step."""
        begin = time.perf_counter()
        self.step(ids, targets)
        synchronize()
        self.first_step_s = time.perf_counter() - begin
        held = allocated()  # with the optimiser's state
        own = sum(p.numel() for p in self.model.parameters()) * 3 * 4
        reset_peak()
        self.step(ids, targets)  # where passes are recorded, they are now: a replay allocates nothing
        self.last_loss = self.step(ids, targets).item()
        # what other contenders hold is not its own
        self.peak_bytes = peak() - held + own

    def turn(self, ids: Tensor, targets: Tensor, steps: int) -> None:
        marks = [Mark()]
        for _ in range(steps):
            begin = time.perf_counter()
            self.step(ids, targets)
            self.launch_ms.append(1e3 * (time.perf_counter() - begin))
            marks.append(Mark())
        synchronize()
        self.step_ms += [a.ms_to(b) for a, b in pairwise(marks)]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class Mark:
    """A moment of the device's work; without a GPU, of the clock."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        self.seconds = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def ms_to(self, other: "Mark") -> float:
        if self.event is None or other.event is None:
            return 1e3 * (other.seconds - self.seconds)
        return self.event.elapsed_time(other.event)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def glade_model(mixer: str, args: argparse.Namespace, recompute: str) -> tuple[nn.Module, Loss]:
    model = LanguageModel(
        ModelConfig(
            mixer=mixer,
            num_layers=args.layers,
            dim=DIM,
            ffn_dim=HIDDEN,
            vocab_size=VOCAB,
            tie_embeddings=False,
            norm_eps=EPS,
            **HEADS[mixer],
        )
    )
    model.recompute_layers = recompute == "layer"
    device = torch.device(args.device)
    passes = Recorded(model, device) if recompute == "none" and device.type == "cuda" else Direct(model, device)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with recomputing() if recompute == "op" else nullcontext():
            losses, _ = passes(token_losses, Row(ids, targets, None))
        return losses.sum() / losses.numel()

    return model, loss


def fla_model(mixer: str, args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    models = import_module("fla.models")
    shape: dict[str, Any] = {
        "hidden_size": DIM,
        "num_hidden_layers": args.layers,
        "vocab_size": VOCAB,
        "intermediate_size": HIDDEN,
    }
    shape |= {"max_position_embeddings": args.tokens, "tie_word_embeddings": False, "norm_eps": EPS, "use_cache": False}
    fused = {"fuse_linear_cross_entropy": True, "fuse_cross_entropy": False}
    heads = {"num_heads": HEADS[mixer]["num_heads"]}
    if mixer == "gla":
        model = models.GLAForCausalLM(models.GLAConfig(expand_k=0.5, expand_v=1.0, **heads, **fused, **shape))
    elif mixer == "gdn":
        config = models.GatedDeltaNetConfig(head_dim=128, expand_v=1.0, **heads, **fused, **shape)
        model = models.GatedDeltaNetForCausalLM(config)
    else:
        model = models.KDAForCausalLM(models.KDAConfig(head_dim=128, **heads, **shape))
        if mixer == "gdn2":
            layer = import_module("fla.layers").GatedDeltaNet2
            for i, block in enumerate(model.model.layers):
                block.attn = layer(DIM, head_dim=128, layer_idx=i, norm_eps=EPS, **heads)
    if args.lift_refusal:
        vars(import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        # FLA shifts labels itself: its label at t + 1 is our target at t
        ids = sent(ids, torch.device(args.device))
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return model, loss


def contender(name: str, mixer: str, args: argparse.Namespace) -> Contender:
    torch.manual_seed(0)
    with torch.device(args.device):
        if name == "fla":
            model, loss = fla_model(mixer, args)
            name = "fla, refusal lifted" if args.lift_refusal and mixer == "gdn" else "fla"
        else:
            model, loss = glade_model(mixer, args, name.removeprefix("glade").strip() or "none")
    optimizer = build_optimizer(model, TrainSettings(), lr=3e-4)
    return Contender(name, model.train(), loss, optimizer, torch.device(args.device))


def share_of_peak(tokens_per_s: float, parameters: int) -> float:
    """Of 989 TFLOP/s dense bf16, by 6 operations a parameter and token, the embedding left out."""
    return 6 * (parameters - VOCAB * DIM) * tokens_per_s / 989e12


def row_of(c: Contender, mixer: str, args: argparse.Namespace) -> dict[str, object]:
    p20, median, p80 = (torch.tensor(c.step_ms).quantile(x).item() for x in (0.2, 0.5, 0.8))
    tokens_per_s = args.batch * args.tokens / median * 1e3
    return {
        "mixer": mixer,
        "contender": c.name,
        "shape": f"B{args.batch} T{args.tokens}, {args.layers} layers of {DIM}",
        "parameters": c.parameters,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "tokens_per_s": round(tokens_per_s),
        "median_ms": round(median, 2),
        "p20_ms": round(p20, 2),
        "p80_ms": round(p80, 2),
        "launch_ms": round(statistics.median(c.launch_ms), 2),
        "peak_gib": round(c.peak_bytes / 2**30, 1),
        "share_of_peak": round(share_of_peak(tokens_per_s, c.parameters), 3),
        "first_step_s": round(c.first_step_s, 1),
        "loss": round(c.last_loss, 3),
        "command": " ".join(["python", *sys.argv]),
    }


def versions() -> str:
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "transformers", "flash-linear-attention"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def compare(mixer: str, args: argparse.Namespace) -> list[dict[str, object]]:
    ids = torch.randint(0, VOCAB, (args.batch, args.tokens))
    targets = ids.roll(-1, 1)
    contenders = []
    for name in args.contenders:
        c = contender(name, mixer, args)
        c.first_step(ids, targets)
        print(f"{mixer} {c.name}: {c.parameters:,} parameters, first step {c.first_step_s:.1f} s", flush=True)
        contenders.append(c)
    sizes = [c.parameters for c in contenders]
    assert max(sizes) < 1.02 * min(sizes), f"not like with like: {sizes} parameters"
    for _ in range(args.turns):
        for c in contenders:
            c.turn(ids, targets, args.steps)
    rows = [row_of(c, mixer, args) for c in contenders]
    for row in rows:
        print(*(f"{name} {row[name]}" for name in (*COLUMNS[:4], *COLUMNS[6:15])), flush=True)
    if args.profile:
        profile(contenders[0], ids, targets)
    return rows


def profile(c: Contender, ids: Tensor, targets: Tensor, steps: int = 3) -> None:
    """Where the device's time of a step goes: by parts, and the kernels that take most."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            c.step(ids, targets)
        synchronize()
    kernels = [(e.key, e.self_device_time_total / 1e3 / steps, e.count / steps) for e in profiler.key_averages()]
    kernels = sorted((k for k in kernels if k[1] > 0), key=lambda k: -k[1])
    parts: dict[str, float] = {}
    for name, ms, _ in kernels:
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")
        parts[part] = parts.get(part, 0.0) + ms
    print(f"{c.name}: {sum(parts.values()):.1f} ms of kernels a step")
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {ms:8.2f} ms  {part}")
    for name, ms, count in kernels[:45]:
        print(f"    {ms:8.2f} ms {count:7.1f} x {1e3 * ms / count:8.1f} us  {name[:110]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["gdn", "gla", "gdn2", "kda"], choices=list(HEADS))
    parser.add_argument(
        "--contenders", nargs="+", default=["glade"], choices=["glade", "glade eager", "glade op", "glade layer", "fla"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="where a step of the first contender goes")
    parser.add_argument("--lift-refusal", action="store_true", help="let FLA run what it refuses on Hopper")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "this compares GPU models: run it on a machine with a CUDA device (bench/cpu_train.py is for CPUs)"
        )
    for mixer in args.mixers:
        rows = compare(mixer, args)
        gc.collect()  # recordings hold memory, and are in circles
        if args.out is not None:
            append(args.out, rows)


def append(path: Path, rows: list[dict[str, object]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
