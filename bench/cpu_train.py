"""A whole training step on the CPU: glade's linear mixers, glade's softmax at equal size, a minimal GPT in plain torch.

    python bench/cpu_train.py                                   # the defaults: T = 128, 256 and 1024; some minutes
    python bench/cpu_train.py --mixers gla --contexts 128 --compile

Forward, backward, clipping, AdamW and reading the loss, on random characters: what a step computes does not depend on
them. For every linear mixer there are a softmax model of glade's and a plain GPT of equal depth and width, whose
feed-forward width makes up the parameters (within 2 %). All contenders live in one process and take turns step by
step, so that whatever else the machine does meets all alike. Every contender runs in every precision given; `ratio` is
the linear mixer's tokens/s over the contender's, best precision of each, by lower quartiles of the step's time, since a
disturbed step is only ever slower. `--clock cpu --threads 1` counts the process's own CPU time: for machines that are
not idle.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the program does

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.model import LanguageModel, ModelConfig
from glade.train.config import TrainSettings
from glade.train.memory import keep_freed_memory
from glade.train.optim import build_optimizer

RESULTS = Path(__file__).parent / "results" / "cpu_train.csv"
COLUMNS = [
    "mixer",
    "contender",
    "context",
    "batch_tokens",
    "precision",
    "compiled",
    "parameters",
    "device",
    "threads",
    "clock",
]
COLUMNS += ["versions", "median_ms", "p25_ms", "p80_ms", "tokens_per_s", "ratio", "first_step_s", "command"]
VOCAB = 101
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEP_OF_WIDTH = 8


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(D, -1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """Learned positions, LayerNorm, fused qkv, SDPA, GELU, tied head: what a minimal training script has."""

    def __init__(self, vocab: int, context: int, dim: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


@dataclass
class Contender:
    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    precision: str
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)

    def step(self, ids: Tensor, targets: Tensor) -> None:
        begin = self.clock()
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext():
            loss = self.loss(ids, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.model.parameters()), 1.0)
        assert torch.isfinite(loss) and torch.isfinite(norm), f"{self.name}: loss {loss}, norm {norm}"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(self.clock() - begin)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def closest(build: Callable[[int], nn.Module], parameters: int) -> nn.Module:
    """`build(hidden)` whose number of parameters is nearest to `parameters`; it is linear in hidden."""
    low, high = (sum(p.numel() for p in build(width).parameters()) for width in (STEP_OF_WIDTH, 2 * STEP_OF_WIDTH))
    steps = max(1, 1 + round((parameters - low) / (high - low)))
    model = build(steps * STEP_OF_WIDTH)
    found = sum(p.numel() for p in model.parameters())
    assert abs(found / parameters - 1) < 0.02, (found, parameters)
    return model


def contenders(mixer: str, args: argparse.Namespace, context: int, precision: str) -> list[Contender]:
    def glade(name: str, hidden: int | None = None) -> LanguageModel:
        shape = {"num_layers": args.layers, "dim": args.dim, "vocab_size": VOCAB}
        return LanguageModel(ModelConfig(mixer=name, ffn_dim=hidden, **shape)).train()

    def plain(hidden: int) -> PlainGPT:
        return PlainGPT(VOCAB, context, args.dim, 4, args.layers, hidden)

    ours = glade(mixer)
    models: dict[str, nn.Module] = {mixer: ours}
    models["softmax"] = closest(lambda hidden: glade("softmax", hidden), ours.num_parameters())
    models["plain GPT"] = closest(plain, ours.num_parameters())
    settings, found = TrainSettings(), []
    for name, model in models.items():
        forward = torch.compile(model) if args.compile else model
        if isinstance(model, PlainGPT):
            loss = forward
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        else:
            loss = lambda ids, targets, forward=forward: (  # noqa: E731
                forward(ids, targets=targets, return_state=False)[0].sum() / ids.numel()
            )
            optimizer = build_optimizer(model, settings, 1e-3)
        found.append(Contender(name, model, loss, optimizer, precision, CLOCKS[args.clock]))
    return found


def measure(mixer: str, context: int, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    all_of_them = [c for precision in args.precisions for c in contenders(mixer, args, context, precision)]
    shape = (max(1, args.batch_tokens // context), context)
    for _ in range(args.steps + args.warmup):
        ids, targets = torch.randint(VOCAB, (2, *shape))
        for c in all_of_them:
            c.step(ids, targets)
    first = {id(c): c.seconds[0] for c in all_of_them}
    for c in all_of_them:
        del c.seconds[: args.warmup]
    p25 = {id(c): statistics.quantiles(c.seconds, n=4)[0] for c in all_of_them}
    best = {name: min(p25[id(c)] for c in all_of_them if c.name == name) for name in {c.name for c in all_of_them}}
    rows = []
    for c in all_of_them:
        row = {
            "mixer": mixer,
            "contender": c.name,
            "context": context,
            "batch_tokens": shape[0] * context,
            "precision": c.precision,
            "compiled": args.compile,
            "parameters": c.parameters,
            "median_ms": f"{1e3 * statistics.median(c.seconds):.1f}",
            "p25_ms": f"{1e3 * p25[id(c)]:.1f}",
            "p80_ms": f"{1e3 * statistics.quantiles(c.seconds, n=5)[3]:.1f}",
            "tokens_per_s": round(shape[0] * context / p25[id(c)]),
            "ratio": f"{best[c.name] / best[mixer]:.2f}",
            "first_step_s": f"{first[id(c)]:.1f}",
        }
        rows.append(row)
        print(*(row[k] for k in ("mixer", "contender", "context", "precision", "parameters", "median_ms", "p25_ms")),
              row["tokens_per_s"], row["ratio"], sep="\t", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["gdn2", "gla"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 256, 1024])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall, or this process's CPU time")
    parser.add_argument("--device", default=platform.processor() or platform.machine(), help="how to call this machine")
    parser.add_argument("--out", type=Path, default=None, help=f"append rows to this file, such as {RESULTS}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the program does; it serves every contender
    print("mixer\tcontender\tT\tprecision\tparameters\tmedian_ms\tp25_ms\ttokens/s\tratio")
    rows = [row for mixer in args.mixers for context in args.contexts for row in measure(mixer, context, args)]
    if args.out is None:
        return
    common = {
        "device": args.device,
        "threads": args.threads,
        "clock": args.clock,
        "command": "python " + " ".join(sys.argv),
    }
    common["versions"] = f"torch {torch.__version__}, python {platform.python_version()}"
    fresh = not args.out.exists()
    with open(args.out, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(row | common for row in rows)


if __name__ == "__main__":
    main()
