"""What can be asked of `glade serve`. Imports no torch, so that `glade serve --help` answers at once."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from glade.config import REQUIRED, setting
from glade.errors import ConfigError
from glade.infer.config import Dtype


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where the server listens, who may ask, and how much: section `serve`."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network: set api_key then")
    port: int = setting(7860, "port of the API and of the page; 0 takes a free one")
    deterministic: bool = setting(False, "every step runs at one batch size, so that neighbours change no bit")
    ui: bool = setting(True, "the web page at /, beside the API")
    votes: Path = setting(Path("votes.jsonl"), "file that the page's votes are added to")
    api_key: str | None = setting(None, "asked of every request but /health; a yaml file keeps it out of `ps`")
    allowed_hosts: tuple[str, ...] = setting(
        (), "names clients may call this server by; none: only local ones if host is"
    )
    max_batch: int = setting(64, "requests decoded together, a model")
    max_waiting: int = setting(256, "requests that may wait, a model; one more is told to come back (429)")
    prefill_tokens: int | None = setting(
        None, "prompt tokens read between two steps of the others; none: 2,048, and 16,384 on a GPU"
    )
    cache_bytes: int = setting(256 * 2**20, "states kept of prompts already read, a model; 0 keeps none")
    max_body_bytes: int = setting(4 * 2**20, "longest request")
    max_prompt_tokens: int = setting(131072, "longest prompt")
    max_new_tokens: int = setting(4096, "longest answer, and of a chat that names none")
    max_choices: int = setting(64, "most answers of one request: prompts times n (or best_of)")
    max_seconds: float = setting(600.0, "longest time a request may take, waiting included")
    max_connections: int = setting(1024, "open connections")
    idle_seconds: float = setting(20.0, "a connection that has not sent a whole request by then is closed")
    shutdown_seconds: float = setting(10.0, "answers in flight may go on this long when the server is told to stop")

    def __post_init__(self) -> None:
        _check("port", self.port, 0 <= self.port < 65536, "from 0 (a free one) to 65535")
        _check("api_key", "...", self.api_key is None or _is_key(self.api_key), "visible ASCII characters, or none")
        zero = ("port", "cache_bytes", "max_waiting", "shutdown_seconds")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and f.name not in zero:
                _check(f.name, value, 0 < value < float("inf"), "above 0")
        for name in zero[1:]:
            _check(name, getattr(self, name), 0 <= getattr(self, name) < float("inf"), "0 or above")


def _is_key(key: str) -> bool:
    return bool(key) and all(33 <= ord(c) <= 126 for c in key)


def _check(key: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"serve.{key} is {value}; it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """`glade serve`: checkpoints behind an OpenAI-compatible API and a web page."""

    checkpoints: tuple[str, ...] = setting(REQUIRED, "run folders, checkpoint folders, or Hugging Face names")
    names: tuple[str, ...] = setting((), "what clients call them, in that order; none: the folders' names")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto takes the accelerator if there is one")
    dtype: Dtype | None = setting(None, "number format of the weights; none keeps the checkpoint's")
    serve: ServeSettings = field(default_factory=ServeSettings)

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("nothing to serve: give one or several checkpoints, as in `glade serve runs/demo`")
        if self.names and len(self.names) != len(self.checkpoints):
            raise ConfigError(
                f"{len(self.names)} names for {len(self.checkpoints)} checkpoints; give one for each, or none"
            )
