"""The server under load: many streams at once, clients that leave, requests that are wrong. A bounded client, loopback.

    python bench/serve.py runs/demo                          # all three, a few minutes
    python bench/serve.py runs/demo --parts load --streams 64 --tokens 64

    load         every stream's text must be the greedy continuation computed apart: none lost, none crossed
    disconnects  streams are dropped at random moments, some with a reset, while others go on and must stay right
    malformed    a seeded fuzzer: broken JSON and HTTP, wrong types, huge values, bad UTF-8, half requests

After each part the server must be as it was: all slots free, its open files back to what they were, and healthy. The
server is a process of its own; a part that fails ends the program with status 1, and no row is written.
"""

import argparse
import asyncio
import csv
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

import glade

RESULTS = Path(__file__).parent / "results" / "serve_cpu.csv"
COLUMNS = [
    "part",
    "model",
    "requests",
    "concurrency",
    "tokens",
    "seconds",
    "tokens_per_s",
    "first_p50_ms",
    "first_p99_ms",
]
COLUMNS += [
    "between_p50_ms",
    "between_p99_ms",
    "outcome",
    "rss_before_mb",
    "rss_after_mb",
    "device",
    "versions",
    "command",
]

Row = dict[str, Any]


class Server:
    """`glade serve` in a process of its own."""

    def __init__(self, checkpoint: str, settings: list[str]) -> None:
        command = [sys.executable, "-m", "glade", "serve", checkpoint, "--names=model", "--serve.port=0"]
        command += ["--serve.ui=false", "--serve.idle_seconds=5", *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = next(int(found[1]) for line in self.process.stdout if (found := re.search(r":(\d+)/v1", line)))
        self.url = f"http://127.0.0.1:{self.port}"
        until(lambda: httpx.get(f"{self.url}/health").status_code == 200, 60)

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def at_rest(self) -> bool:
        """No request runs, waits or is read."""
        text = httpx.get(f"{self.url}/metrics").text
        return all(
            float(re.search(rf'^glade_engine_{name}{{model="model"}} (\S+)$', text, re.M)[1]) == 0  # type: ignore[index]
            for name in ("running", "waiting", "prefilling")
        )

    def check(self, open_files: int) -> None:
        """Exits unless the server is healthy, idle and holds no more files than before."""
        if self.process.poll() is not None:
            sys.exit(f"the server is gone, status {self.process.returncode}")
        if httpx.get(f"{self.url}/health").status_code != 200:
            sys.exit("the server is not healthy")
        if not until(self.at_rest, 30):
            sys.exit("slots of the engine are not free")
        if not until(lambda: self.open_files() <= open_files, 30):
            sys.exit(f"the server holds {self.open_files()} open files, {open_files} before")


def until(holds: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if holds():
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    return False


class Stream(NamedTuple):
    """What one stream brought."""

    text: str
    first_s: float
    between_s: list[float]


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int, leave_after: int | None = None) -> Stream | None:
    """One greedy answer, read to its end; None where the client left after that many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    began = time.monotonic()
    text, times = "", []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            times.append(time.monotonic())
            text += event["choices"][0]["text"]
            if leave_after is not None and len(times) >= leave_after:
                return None
    return Stream(text, times[0] - began, [b - a for a, b in pairwise(times)])


def prompts_of(num: int) -> list[str]:
    """Prompts of several lengths, no two alike."""
    words = ["the", "king", "and", "his", "sword", "of", "night", "shall"]
    words += ["speak", "to", "a", "fair", "lady", "in", "love", "death"]
    chosen = random.Random(0)
    return [
        f"{' '.join(chosen.choices(words, k=1 + i % 24))} {words[i % 16]} {words[i // 16 % 16]}" for i in range(num)
    ]


def expected_texts(checkpoint: str, prompts: list[str], tokens: int) -> list[str]:
    """Each prompt's greedy continuation, its own batch, without server and engine."""
    model = glade.load(checkpoint)
    texts = []
    for prompt in prompts:
        texts.append(glade.generate(model, prompt, max_new_tokens=tokens, temperature=0))
    return texts  # type: ignore[return-value]


def percentiles(seconds: list[float]) -> tuple[str, str]:
    ranked = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"{1e3 * ranked[49]:.1f}", f"{1e3 * ranked[98]:.1f}"


async def load(server: Server, prompts: list[str], expected: list[str], tokens: int, rounds: int) -> Row:
    """All prompts at once, `rounds` times."""
    began = time.monotonic()
    answers: list[Stream | None] = []
    async with client_of(server, len(prompts)) as client:
        for _ in range(rounds):
            answers += await asyncio.gather(*(stream(client, prompt, tokens) for prompt in prompts))
    seconds = time.monotonic() - began
    wrong = [i for i, answer in enumerate(answers) if answer is None or answer.text != expected[i % len(prompts)]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(answers)} answers are lost or crossed, the first of prompt {wrong[0]}")
    whole = [answer for answer in answers if answer is not None]
    first = percentiles([answer.first_s for answer in whole])
    between = percentiles([s for answer in whole for s in answer.between_s])
    return {
        "requests": len(answers),
        "concurrency": len(prompts),
        "tokens": len(answers) * tokens,
        "seconds": f"{seconds:.1f}",
        "tokens_per_s": f"{len(answers) * tokens / seconds:.0f}",
        "first_p50_ms": first[0],
        "first_p99_ms": first[1],
        "between_p50_ms": between[0],
        "between_p99_ms": between[1],
        "outcome": f"{len(answers)} of {len(answers)} texts as computed apart",
    }


def client_of(server: Server, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300)


async def disconnects(server: Server, prompts: list[str], expected: list[str], tokens: int, num: int) -> Row:
    """`num` clients, as many at once as there are prompts; every second one leaves at a random moment."""
    chosen = random.Random(1)
    outcomes: Counter[str] = Counter()
    room = asyncio.Semaphore(len(prompts))
    began = time.monotonic()

    async def visit(i: int, client: httpx.AsyncClient) -> None:
        at = i % len(prompts)
        async with room:
            if i % 2:
                kind = chosen.choice(("tokens", "time", "reset"))
                outcomes[f"left ({kind})"] += 1
                await leave(server, client, prompts[at], tokens, kind, chosen)
                return
            answer = await stream(client, prompts[at], tokens)
            outcomes["right" if answer is not None and answer.text == expected[at] else "wrong"] += 1

    async with client_of(server, len(prompts)) as client:
        await asyncio.gather(*(visit(i, client) for i in range(num)))
    if outcomes["wrong"]:
        sys.exit(f"{outcomes['wrong']} answers are lost or crossed beside clients that left")
    told = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    seconds = f"{time.monotonic() - began:.1f}"
    return {"requests": num, "concurrency": len(prompts), "seconds": seconds, "outcome": told}


async def leave(
    server: Server, client: httpx.AsyncClient, prompt: str, tokens: int, kind: str, chosen: random.Random
) -> None:
    """Ask, and go: after some tokens, after some time, or at once with a reset of the connection."""
    if kind == "tokens":
        await stream(client, prompt, tokens, leave_after=chosen.randrange(1, tokens))
    elif kind == "time":
        try:
            async with asyncio.timeout(chosen.random()):
                await stream(client, prompt, tokens)
        except TimeoutError:
            pass
    else:
        body = json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": chosen.random() < 0.5}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_bytes(body))
        await writer.drain()
        await asyncio.sleep(chosen.random() / 4)
        writer.transport.abort()


def request_bytes(body: bytes, method: str = "POST", path: str = "/v1/completions", length: int | None = None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


FIELDS = [
    "prompt",
    "messages",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "stream",
    "logprobs",
]
FIELDS += ["echo", "best_of", "stream_options", "logit_bias", "suffix", "user", "top_k", "min_p", "nonsense"]


def odd_value(chosen: random.Random) -> Any:
    """A value that some field will not like."""
    simple = [
        None,
        True,
        -1,
        0,
        2**63,
        10**400,
        -(10**30),
        1e308,
        0.5,
        "",
        "a",
        "\x00",
        "\udcff",
        "漢" * 50,
        "x" * 5000,
    ]
    nested: Any = chosen.choice(simple)
    for _ in range(chosen.randrange(4)):
        nested = chosen.choice(([nested], {"a": nested}, [nested, 1], {"role": "user", "content": nested}))
    return nested


def malformed(chosen: random.Random) -> bytes:
    """The bytes of a request that deserves an error."""
    fields = {name: odd_value(chosen) for name in chosen.sample(FIELDS, chosen.randrange(1, 6))} | {"nonsense": 1}
    body = json.dumps(fields).encode("utf-8", "surrogatepass")
    kind = chosen.randrange(10)
    path = chosen.choice(("/v1/completions", "/v1/chat/completions"))
    if kind == 0:
        body = body[: chosen.randrange(len(body))]
    elif kind == 1:
        at = chosen.randrange(len(body))
        body = body[:at] + chosen.randbytes(4) + body[at:]
    elif kind == 2:
        body = chosen.choice((b"[" * 50_000, b'{"prompt": NaN}', b'{"prompt": "\xff\xfe"}', b"", b"\x00" * 500))
    elif kind == 3:
        return request_bytes(body, chosen.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW")), path)
    elif kind == 4:
        return request_bytes(body, path=chosen.choice(("/", "/v1", "/v2/x", "/%00", "/../x", "//", "/v1/models/a%2Fb")))
    elif kind == 5:
        return chosen.randbytes(chosen.randrange(1, 300)) + b"\r\n\r\n"
    elif kind == 6:
        return request_bytes(body, path=path, length=chosen.choice((10**12, 10**30, -1)))
    return request_bytes(body, path=path)


async def fuzz(server: Server, num: int, concurrency: int) -> Row:
    """`num` requests that deserve an error; a few are half a request, whose connection is left open or half closed."""
    chosen = random.Random(2)
    statuses: Counter[str] = Counter()
    room = asyncio.Semaphore(concurrency)
    began = time.monotonic()

    async def ask(data: bytes, kind: str) -> None:
        async with room, asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                writer.write(data[: len(data) // 2] if kind != "whole" else data)
                if kind == "half closed":
                    writer.write_eof()
                if kind == "dropped":
                    return
                answer = await reader.read()
                status = answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "closed"
                statuses[status] += 1
                head, _, content = answer.partition(b"\r\n\r\n")
                if status >= "400" and status != "closed" and b"HEAD " not in data[:5] and b'"error"' not in content:
                    sys.exit(f"an error without OpenAI's form: {head[:200]!r} {content[:200]!r}")
            except ConnectionError:
                statuses["closed"] += 1
            finally:
                writer.close()

    kinds = chosen.choices(("whole", "half closed", "dropped", "slow"), (0.9, 0.05, 0.04, 0.01), k=num)
    await asyncio.gather(*(ask(malformed(chosen), kind) for kind in kinds))
    seconds = time.monotonic() - began
    if statuses["500"] or statuses["200"]:
        sys.exit(f"a malformed request was answered, or broke the server: {dict(statuses)}")
    told = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    return {"requests": num, "concurrency": concurrency, "seconds": f"{seconds:.1f}", "outcome": told}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run or checkpoint folder")
    parser.add_argument("--parts", nargs="+", default=["load", "disconnects", "malformed"])
    parser.add_argument("--streams", type=int, default=64, help="streams at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a stream")
    parser.add_argument("--rounds", type=int, default=3, help="how often all streams run in part load")
    parser.add_argument("--clients", type=int, default=400, help="clients of part disconnects")
    parser.add_argument("--malformed", type=int, default=10_000, help="requests of part malformed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file that rows are added to")
    settings, serve = parser.parse_known_args()
    prompts = prompts_of(settings.streams)
    expected = expected_texts(settings.checkpoint, prompts, settings.tokens)
    server = Server(settings.checkpoint, serve)
    parts: dict[str, Callable[[], Awaitable[Row]]] = {
        "load": lambda: load(server, prompts, expected, settings.tokens, settings.rounds),
        "disconnects": lambda: disconnects(server, prompts, expected, settings.tokens, settings.clients),
        "malformed": lambda: fuzz(server, settings.malformed, 64),
    }
    common = {
        "model": Path(settings.checkpoint).name,
        "device": f"cpu ({cpu_name()}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads",
        "versions": f"glade {glade.__version__}; torch {torch.__version__}; python {platform.python_version()}",
        "command": " ".join(["python", "bench/serve.py", *sys.argv[1:]]),
    }
    rows = []
    try:
        # what the first request of a process costs is not what is measured
        asyncio.run(load(server, prompts, expected, settings.tokens, 1))
        for name in settings.parts:
            rss_mb, open_files = server.rss_mb(), server.open_files()
            row = asyncio.run(parts[name]())  # type: ignore[arg-type]
            server.check(open_files)
            rows.append({"part": name, **common, **row})
            rows[-1] |= {"rss_before_mb": f"{rss_mb:.0f}", "rss_after_mb": f"{server.rss_mb():.0f}"}
            print(json.dumps(rows[-1]), flush=True)
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)
    new = not settings.output.exists()
    with settings.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
