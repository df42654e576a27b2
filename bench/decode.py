"""Decoding: tokens a second of the engine, by batch; the state's bytes beside them.

    GOMP_SPINCOUNT=1000 python bench/decode.py --threads 1
    python bench/decode.py --mixers gdn2 softmax --batches 1 8 64 --layers 12 --dim 512 --dtype bfloat16
    python bench/decode.py --device cuda --mixers gdn gdn2 gla --parts step engine prefill seen flat --dtype bfloat16 \\
        --layers 24 --dim 1024 --batches 1 8 64 --out bench/results/decode_h200.csv

Random weights, no checkpoint; logits with a standard deviation of 4. Percentiles are over steps.

    engine   one step of the engine, everything included: the forward, the sampling of each row by its own rules, the
             copy to the host, the listeners. Steps in which all rows decode and nobody's prompt is read
    step     the decode step alone, greedy, a token on the device into the next: on a GPU replays of its graph
    fla      `step` in turns with flash-linear-attention's model of the same shape through its own cache, on a GPU;
             FLA's has read a prompt of `--prompt` tokens
    profile  `step` on a GPU, kernel by kernel (printed, no row)
    prefill  a text of `--long` tokens: read as the engine reads it, in pieces, beside one training forward
    seen     the engine's time to the first token of a prompt of 30,000 ids that it has read before, and of a fresh one
    flat     memory while `--tokens` tokens are generated, by requests of 200 each, at the largest batch: the first
             reading is after a tenth of them; its row goes to a file of its own beside `--out`, named ..._flat.csv
"""

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from glade.infer.captured.graphs import Graphs
from glade.infer.config import SamplingParams
from glade.infer.engine import Delta, Engine, Request
from glade.infer.pieces import Pieces
from glade.infer.rows import growing_layers
from glade.infer.step import decode_step
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.model.quantized import quantize
from glade.model.state import State

RESULTS = Path(__file__).parent / "results" / "decode.csv"
COLUMNS = ["what", "model", "parameters", "dtype", "device", "threads", "versions", "path", "sampling", "batch"]
COLUMNS += ["prompt_tokens", "steps", "step_ms", "p10_ms", "p90_ms", "tokens_per_s", "state_bytes", "peak_bytes"]
COLUMNS += ["command"]
FLAT = ["model", "parameters", "dtype", "device", "threads", "versions", "path", "batch", "tokens", "requests"]
FLAT += ["seconds", "tokens_per_s", "readings", "state_bytes", "cache_bytes"]
# of each kind of memory the first reading, the last and the largest
MEMORY = ["resident", "allocated", "reserved", "device_used"]
FLAT += [f"{which}_{memory}_bytes" for memory in MEMORY for which in ("first", "last", "most")] + ["command"]
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
        for part in args.parts:
            PARTS[part](args, model, mixer)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["engine"])
    parser.add_argument("--mixers", nargs="+", default=["gdn2"], help="or a pattern such as 'gdn gdn gdn swa'")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--window", type=int, default=512, help="of swa layers")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=24, help="timed steps; four more go before")
    parser.add_argument("--sampling", nargs="+", choices=SAMPLING, default=list(SAMPLING))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--long", type=int, default=32_768, help="tokens of the text that `prefill` reads")
    parser.add_argument("--pieces", nargs="+", type=int, default=[2048], help="tokens of a prompt read in a step")
    parser.add_argument("--tokens", type=int, default=100_000, help="that `flat` generates, at the largest batch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows are added to this file")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args()


def build(args: argparse.Namespace, mixer: str, **options: int) -> LanguageModel:
    torch.manual_seed(0)
    # heads of 128 channels where the width allows it; GLA's values twice as wide as its keys, as published
    wide = {"num_heads": args.dim // 256, "head_dim": 128, "head_dim_v": 256} if mixer == "gla" else {}
    heads = {"num_heads": args.dim // 128, **wide} if args.dim % 256 == 0 and args.dim >= 1024 else {}
    window = args.window if "swa" in mixer else None
    config = ModelConfig(
        layers=mixer, num_layers=args.layers, dim=args.dim, vocab_size=args.vocab, window=window, **(heads | options)
    )
    with torch.device(args.device):
        model = LanguageModel(config).eval()
    with torch.no_grad():
        # as wide as a trained model's logits: a nucleus of flat ones would be the whole vocabulary
        cast(Tensor, model.final_norm.weight).fill_(4 / (float(model.embed.weight.std()) * args.dim**0.5))
    if args.dtype == "int8":
        return quantize(model.to(torch.bfloat16) if args.device.startswith("cuda") else model)
    return model.to(getattr(torch, args.dtype))


def engine_steps(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    for sampling in args.sampling:
        for batch in args.batches:
            times, state_bytes = time_steps(args, model, sampling, batch)
            report(args, model, mixer, "engine", times, batch, state_bytes, sampling=sampling, prompt=args.prompt)


def fill(engine: Engine, batch: int, prompt_tokens: int, params: SamplingParams) -> None:
    """`batch` requests with prompts of their own, until all decode."""
    vocab = engine.model.config.vocab_size or 0
    for row in range(batch):
        prompt = tuple((7919 * (row + 1) + 31 * t) % vocab for t in range(prompt_tokens))
        engine.submit(Request(prompt=prompt, params=params), _nobody)
    while engine.stats().running < batch:
        engine.step()


def _nobody(delta: Delta) -> None:
    """A listener that only hears faults, and ends the measurement: nothing could be made of it."""
    if delta.error is not None:
        print(f"a request failed: {delta.error}", file=sys.stderr, flush=True)
        os._exit(1)


def time_steps(args: argparse.Namespace, model: LanguageModel, sampling: str, batch: int) -> tuple[list[float], int]:
    """Milliseconds of each timed step, and the bytes of the table of states."""
    engine = Engine(model, max_batch=batch, cache_bytes=0)
    fill(engine, batch, args.prompt, SAMPLING[sampling])
    times = []
    for step in range(4 + args.steps):
        start = time.perf_counter()
        engine.step()  # ends when tokens are on the host (a GPU's: of the step before), so it waits by itself
        if step >= 4:
            times.append(1e3 * (time.perf_counter() - start))
    state_bytes = engine.stats().state_bytes
    engine.close()
    return times, state_bytes


def step_alone(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    for batch in args.batches:
        run, state = stepper(model, batch)
        # ten in a row, so that the host's launches lie beside the device's work
        times = [1e2 * seconds(args.device, lambda run=run: [run() for _ in range(10)]) for _ in range(2 + args.steps)]
        times = times[2:]
        report(args, model, mixer, "step", times, batch, state.nbytes, sampling="greedy")


def stepper(model: LanguageModel, batch: int, *, overlap: bool = True) -> tuple[Callable[[], object], State]:
    """Something that reads a token a row and puts the most likely next ones in its place.

    overlap: whether a kernel of a recorded step may begin while the one before it ends, where the device can
    """
    step, state = decode_step(model), model.init_state(batch)
    device = model.embed.weight.device
    ids = torch.arange(batch, device=device)
    program = step.captured
    if program is None:
        return lambda: ids.copy_(step(ids, state).argmax(-1)), state
    slots = torch.arange(batch, device=device)
    graphs, tensors = Graphs(device), [slots, torch.ones_like(slots)]
    program.bind(state)
    if not overlap:
        program.overlap = {"OVERLAP": False}

    def advance(tensors: Sequence[Tensor]) -> Tensor:
        return ids.copy_(program.enqueue(ids, state, tensors[0], tensors[1]).argmax(-1))

    return lambda: graphs.run("step", tensors, advance), state


def beside_fla(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    """Ours is as wide as FLA's inside. FLA's head is not tied to its embedding, which a step does not read."""
    if not args.device.startswith("cuda") or (args.dim, args.vocab, args.dtype) != (1024, 32_000, "bfloat16"):
        raise SystemExit(
            "--parts fla needs --device cuda --dtype bfloat16 --dim 1024 --vocab 32000: FLA's model is built so"
        )
    from train_gpu import HIDDEN, fla_model

    model = build(args, mixer, ffn_dim=HIDDEN)
    shape = argparse.Namespace(layers=args.layers, tokens=4096, device=args.device, lift_refusal=False)
    with torch.device(args.device):
        peer = fla_model(mixer, shape)[0].to(torch.bfloat16).eval()
    size, name = sum(p.numel() for p in peer.parameters()), f"fla {version('flash-linear-attention')}"
    for batch in args.batches:
        (ours, state), theirs = stepper(model, batch), fla_stepper(peer, batch, args.prompt, args.device)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(2 + args.steps):
            times[0].append(1e2 * seconds(args.device, lambda run=ours: [run() for _ in range(10)]))
            times[1].append(1e3 / 3 * seconds(args.device, lambda run=theirs: [run() for _ in range(3)]))
        told = partial(report, args, model, mixer, "step, in turns with fla", batch=batch, sampling="greedy")
        told(times[0][2:], state_bytes=state.nbytes)
        told(times[1][2:], state_bytes=0, prompt=args.prompt, path=name, size=size)
        ratio = statistics.median(times[1][2:]) / statistics.median(times[0][2:])
        print(f"{mixer:12} batch {batch:3}: {ratio:.1f} times {name}", flush=True)


def fla_stepper(model: nn.Module, batch: int, prompt_tokens: int, device: str) -> Callable[[], object]:
    """As `stepper`, after a prompt. It is read 64 tokens at a time, which FLA's recurrent kernels do: those for longer
    pieces would be tuned for minutes first, and leave the same cache."""

    @torch.no_grad()
    def read(ids: Tensor, past: object) -> list[Any]:
        answer = model(input_ids=ids, past_key_values=past, use_cache=True)
        return [answer.logits[:, -1:].argmax(-1), answer.past_key_values]

    given: list[Any] = [None, None]
    for piece in torch.ones(batch, max(1, prompt_tokens), dtype=torch.long, device=device).split(64, 1):
        given = read(piece, given[1])

    def step() -> None:
        given[:] = read(*given)

    return step


def seconds(device: str, work: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def profile(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    """Kernel by kernel and size of grid. None begins before the one in front of it has ended, so that times add up:
    they are more than an overlapped step takes."""
    for batch in args.batches:
        run, _ = stepper(model, batch, overlap=False)
        for _ in range(4):
            run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(10):
                run()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        times: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                grid = "x".join(map(str, event["args"].get("grid", [])))
                times.setdefault((event["name"][:60], grid), []).append(event["dur"])
        for (name, grid), each in sorted(times.items(), key=lambda item: -sum(item[1]))[:20]:
            whole, count = sum(each) / 10, len(each) / 10
            print(
                f"{mixer} batch {batch} {whole:8.1f} us a step = {count:5.1f} x {whole / count:6.2f} us  {name} {grid}"
            )


def prefill(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    """Its pieces are as large as the engine's; the forward keeps what a backward would need."""
    ids = torch.randint(args.vocab, (1, args.long), device=args.device)
    tokens, reader = ids[0].tolist(), Pieces(model, growing_layers(model))

    def pieces(size: int) -> None:
        state = None
        for start in range(0, args.long, size):
            (state,) = reader.read([tokens[start : start + size]], [state])

    works: dict[str, Callable[[], object]] = {
        f"prefill, pieces of {size}": partial(pieces, size) for size in args.pieces
    }
    works["training forward"] = partial(model, ids, targets=ids)
    for what, work in works.items():
        times = [1e3 * seconds(args.device, work) for _ in range(6)][2:]
        report(args, model, mixer, what, times, 1, model.state_bytes(args.long), prompt=args.long, tokens=args.long)


def seen(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    engine = Engine(model, max_batch=8, prefill_tokens=args.pieces[-1], cache_bytes=2**31)
    prompt = tuple(torch.randint(args.vocab, (30_000,)).tolist())

    def first_token(prompt: tuple[int, ...]) -> None:
        came: list[Delta] = []
        engine.submit(Request(prompt=prompt, params=SamplingParams(max_new_tokens=1, temperature=0)), came.append)
        while not came:
            engine.step()

    # the first answers compile and record
    for i in range(3):
        first_token((i, *prompt[1:]))
    fresh = [1e3 * seconds(args.device, lambda: first_token(prompt))]
    again = [1e3 * seconds(args.device, lambda: first_token(prompt)) for _ in range(10)]
    report(args, model, mixer, "first token, prompt never seen", fresh, 1, model.state_bytes(30_000), prompt=30_000)
    report(args, model, mixer, "first token, prompt seen", again, 1, model.state_bytes(30_000), prompt=30_000)
    engine.close()


def report(
    args: argparse.Namespace,
    model: LanguageModel,
    mixer: str,
    what: str,
    times: list[float],
    batch: int,
    state_bytes: int,
    *,
    sampling: str = "",
    prompt: int = 0,
    tokens: int | None = None,
    path: str | None = None,
    size: int | None = None,
) -> None:
    """One row: `times` in ms, each of which made `tokens` tokens (a batch), by a step's path or another one.

    size: parameters, if it is another model's
    """
    median, tokens = statistics.median(times), tokens or batch
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times
    cuda = args.device.startswith("cuda")
    step = decode_step(model)
    row = {
        "what": what,
        **common(args, model, mixer),
        "parameters": size or model.num_parameters(),
        "path": path or step.path,
        "sampling": sampling,
        "batch": batch,
        "prompt_tokens": prompt,
        "steps": len(times),
        "step_ms": f"{median:.3f}",
        "p10_ms": f"{deciles[0]:.3f}",
        "p90_ms": f"{deciles[-1]:.3f}",
        "tokens_per_s": f"{1e3 * tokens / median:.1f}",
        "state_bytes": state_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else "",
    }
    print(
        f"{mixer:12} {what} {row['path']} {sampling:8} batch {batch:3}: {row['tokens_per_s']:>9} tokens/s, "
        f"{row['step_ms']} ms ({row['p10_ms']} to {row['p90_ms']}), states {state_bytes / 2**20:.1f} MiB, peak "
        f"{row['peak_bytes'] or resident_bytes()} B {step.reason}",
        flush=True,
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    append(args, args.out, COLUMNS, row)


def common(args: argparse.Namespace, model: LanguageModel, mixer: str) -> dict[str, object]:
    """The columns that every row has."""
    return {
        "model": f"{mixer} {args.layers} x {args.dim}, vocabulary {args.vocab}",
        "parameters": model.num_parameters(),
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "threads": args.threads,
        "versions": f"torch {torch.__version__}, python {platform.python_version()}",
        "command": "python bench/decode.py " + " ".join(sys.argv[1:]),
    }


def append(args: argparse.Namespace, path: Path, columns: list[str], row: dict[str, object]) -> None:
    if args.no_csv:
        return
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def flat(args: argparse.Namespace, model: LanguageModel, mixer: str) -> None:
    """Requests of 200 new tokens, one after the other in every slot, until `--tokens` are generated.

    The prefix cache has room for a few dozen states, so that it is full soon.
    """
    batch, tokens = max(args.batches), args.tokens
    engine = Engine(model, max_batch=batch, max_waiting=batch, cache_bytes=24 * model.state_bytes(1))
    served, steps, start = 0, 0, time.perf_counter()
    readings: list[dict[str, int]] = []
    marks = [tokens * i // 10 for i in range(1, 11)]
    while marks:
        while engine.stats().waiting < batch:
            prompt = (served % 97, served % 89, 5)
            params = SamplingParams(max_new_tokens=200, seed=served)
            engine.submit(Request(prompt=prompt, params=params), _nobody)
            served += 1
        engine.step()
        steps += 1
        stats = engine.stats()
        at_mark = stats.generated_tokens >= marks[0]
        if at_mark or (readings and steps % 64 == 0):
            readings.append(memory(args.device))
        if at_mark:
            marks.pop(0)
            now = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in readings[-1].items())
            print(
                f"{mixer} {stats.generated_tokens:9} tokens in {time.perf_counter() - start:.1f} s, "
                f"{served - stats.waiting} requests: MiB {now}; states {stats.state_bytes} B, cache "
                f"{stats.cache_bytes} B in {stats.cached_prefixes} prefixes",
                flush=True,
            )
    elapsed, stats = time.perf_counter() - start, engine.stats()
    row = common(args, model, mixer) | {
        "path": decode_step(model).path,
        "batch": batch,
        "tokens": stats.generated_tokens,
        "requests": served - stats.waiting,
        "seconds": f"{elapsed:.1f}",
        "tokens_per_s": f"{stats.generated_tokens / elapsed:.0f}",
        "readings": len(readings),
        "state_bytes": stats.state_bytes,
        "cache_bytes": stats.cache_bytes,
    }
    for name in MEMORY:
        sizes = [reading[name] for reading in readings]
        row |= {f"{which}_{name}_bytes": x for which, x in zip(("first", "last", "most"), _span(sizes), strict=True)}
        print(
            f"{mixer} {name}: first {sizes[0]} B, last {sizes[-1]} B, at most {max(sizes)} B of {len(sizes)} readings"
        )
    append(args, args.out.with_name(f"{args.out.stem}_flat.csv"), FLAT, row)
    engine.close()


def _span(sizes: list[int]) -> tuple[int, int, int]:
    return sizes[0], sizes[-1], max(sizes)


def memory(device: str) -> dict[str, int]:
    """Bytes: of this process, of torch's tensors on the device, of what torch holds there, of all that is in use."""
    sizes = dict.fromkeys(MEMORY, 0) | {"resident": resident_bytes()}
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        sizes["allocated"], sizes["reserved"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        sizes["device_used"] = total - free
    return sizes


def resident_bytes() -> int:
    """Linux: the pages of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor() -> str:
    """The CPU's name as Linux gives it, or what Python knows of it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


PARTS: dict[str, Callable[[argparse.Namespace, LanguageModel, str], None]] = {
    "engine": engine_steps,
    "step": step_alone,
    "fla": beside_fla,
    "profile": profile,
    "prefill": prefill,
    "seen": seen,
    "flat": flat,
}

if __name__ == "__main__":
    main()
