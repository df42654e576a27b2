"""Decoding: tokens a second of the engine, by batch; the state's bytes beside them.

    GOMP_SPINCOUNT=1000 python bench/decode.py --threads 1
    python bench/decode.py --mixers gdn2 softmax --batches 1 8 64 --layers 12 --dim 512 --dtype bfloat16
    python bench/decode.py --flat 100000                # memory while so many tokens are generated

Random weights, no checkpoint; logits with a standard deviation of 4. `step_ms` is one step of the engine, everything
included: the forward, the sampling of each row by its own rules, the copy to the host, the listeners. What is timed is
steps in which all rows decode and nobody's prompt is read. Percentiles are over steps.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from glade.infer.config import SamplingParams
from glade.infer.engine import Delta, Engine, Request
from glade.infer.step import decode_step
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel

RESULTS = Path(__file__).parent / "results" / "decode.csv"
COLUMNS = ["what", "model", "parameters", "dtype", "device", "threads", "versions", "path", "sampling", "batch"]
COLUMNS += ["prompt_tokens", "steps", "step_ms", "p10_ms", "p90_ms", "tokens_per_s", "state_bytes", "command"]
SAMPLING = {
    "greedy": SamplingParams(temperature=0, max_new_tokens=2**31),
    "plain": SamplingParams(temperature=1.0, seed=1, max_new_tokens=2**31),
    "nucleus": SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_new_tokens=2**31),
}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    for mixer in args.mixers:
        model = build(args, mixer)
        if args.flat:
            flat(model, args.batches[-1], args.flat)
            continue
        for sampling in args.sampling:
            for batch in args.batches:
                report(args, model, mixer, sampling, batch, time_steps(args, model, sampling, batch))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["gdn2"], help="or a pattern such as 'gdn gdn gdn swa'")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--window", type=int, default=512, help="of swa layers")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=24, help="timed steps; four more go before")
    parser.add_argument("--sampling", nargs="+", choices=SAMPLING, default=list(SAMPLING))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flat", type=int, default=0, metavar="TOKENS", help="generate so many, print memory")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args()


def build(args: argparse.Namespace, mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    window = args.window if "swa" in mixer else None
    config = ModelConfig(layers=mixer, num_layers=args.layers, dim=args.dim, vocab_size=args.vocab, window=window)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        # as wide as a trained model's logits: a nucleus of flat ones would be the whole vocabulary
        logits, _ = model(torch.arange(64)[None] % args.vocab)
        cast(Tensor, model.final_norm.weight).mul_(4 / logits.std())
    return model.to(args.device, getattr(torch, args.dtype))


def fill(engine: Engine, batch: int, prompt_tokens: int, params: SamplingParams) -> None:
    """`batch` requests with prompts of their own, until all decode."""
    vocab = engine.model.config.vocab_size or 0
    for row in range(batch):
        prompt = tuple((7919 * (row + 1) + 31 * t) % vocab for t in range(prompt_tokens))
        engine.submit(Request(prompt=prompt, params=params), _nobody)
    while engine.stats().running < batch:
        engine.step()


def _nobody(_: Delta) -> None:
    """A listener that does not listen."""


def time_steps(args: argparse.Namespace, model: LanguageModel, sampling: str, batch: int) -> tuple[list[float], int]:
    """Milliseconds of each timed step, and the bytes of the table of states."""
    engine = Engine(model, max_batch=batch, cache_bytes=0)
    fill(engine, batch, args.prompt, SAMPLING[sampling])
    times = []
    for step in range(4 + args.steps):
        start = time.perf_counter()
        engine.step()  # ends with a copy to the host: it waits for the device by itself
        if step >= 4:
            times.append(1e3 * (time.perf_counter() - start))
    state_bytes = engine.stats().state_bytes
    engine.close()
    return times, state_bytes


def report(
    args: argparse.Namespace,
    model: LanguageModel,
    mixer: str,
    sampling: str,
    batch: int,
    measured: tuple[list[float], int],
) -> None:
    times, state_bytes = measured
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10)
    row = {
        "what": "engine",
        "model": f"{mixer} {args.layers} x {args.dim}, vocabulary {args.vocab}",
        "parameters": model.num_parameters(),
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "threads": args.threads,
        "versions": f"torch {torch.__version__}, python {platform.python_version()}",
        "path": decode_step(model).path,
        "sampling": sampling,
        "batch": batch,
        "prompt_tokens": args.prompt,
        "steps": len(times),
        "step_ms": f"{median:.3f}",
        "p10_ms": f"{deciles[0]:.3f}",
        "p90_ms": f"{deciles[-1]:.3f}",
        "tokens_per_s": f"{1e3 * batch / median:.1f}",
        "state_bytes": state_bytes,
        "command": "python bench/decode.py " + " ".join(sys.argv[1:]),
    }
    print(
        f"{mixer:12} {row['path']:6} {sampling:8} batch {batch:3}: {row['tokens_per_s']:>8} tokens/s, "
        f"{row['step_ms']} ms a step ({row['p10_ms']} to {row['p90_ms']}), states {state_bytes / 2**20:.1f} MiB",
        flush=True,
    )
    if args.no_csv:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def flat(model: LanguageModel, batch: int, tokens: int) -> None:
    """Requests of 200 new tokens, one after the other in every slot, until `tokens` are generated."""
    engine = Engine(model, max_batch=batch, max_waiting=batch, cache_bytes=2**21)
    served = 0
    marks = [tokens * i // 10 for i in range(1, 11)]
    while marks:
        while engine.stats().waiting < batch:
            prompt = (served % 97, served % 89, 5)
            params = SamplingParams(max_new_tokens=200, seed=served)
            engine.submit(Request(prompt=prompt, params=params), _nobody)
            served += 1
        engine.step()
        stats = engine.stats()
        if stats.generated_tokens >= marks[0]:
            marks.pop(0)
            print(
                f"{stats.generated_tokens:9} tokens, {served - stats.waiting} requests: resident "
                f"{resident_bytes() / 2**20:.1f} MiB, states {stats.state_bytes} B, cache {stats.cache_bytes} B "
                f"in {stats.cached_prefixes} prefixes",
                flush=True,
            )
    engine.close()


def resident_bytes() -> int:
    """Linux: the pages of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor() -> str:
    """The CPU's name as Linux gives it, or what Python knows of it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
