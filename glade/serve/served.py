"""A checkpoint ready to answer: its model, tokenizer and engine, and what can be said about it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError
from glade.infer.engine import Engine
from glade.infer.generate import tokenizer_of
from glade.infer.text import TokenBytes
from glade.interop.load import find_checkpoint, load
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.serve.config import ServeConfig, ServeSettings


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model under the name that clients call it by."""

    name: str
    folder: Path  # of the checkpoint
    model: LanguageModel
    tokenizer: Tokenizer
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    @cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @cached_property
    def run(self) -> Path | None:
        """The run folder that the checkpoint lies in."""
        parent = self.folder.parent
        return parent.parent if parent.name == "checkpoints" else None

    @cached_property
    def num_parameters(self) -> int:
        return self.model.num_parameters()

    def state_bytes(self, num_tokens: int) -> int:
        """Bytes that one sequence holds after `num_tokens` tokens."""
        return self.model.state_bytes(num_tokens)

    def softmax_bytes(self, num_tokens: int) -> int:
        """Bytes that it would hold if every layer were full attention of the same width, in the same number format."""
        return self._softmax.state_bytes(num_tokens)

    @cached_property
    def _softmax(self) -> LanguageModel:
        config = self.model.config
        same = ModelConfig(mixer="softmax", num_layers=config.num_layers, dim=config.dim, num_heads=1, vocab_size=1)
        with torch.device("meta"):
            return LanguageModel(same).to(self.model.embed.weight.dtype)


def load_all(config: ServeConfig) -> dict[str, Served]:
    """The models of a server by name, their engines not yet started.

    Raises:
        CheckpointError: a checkpoint that is missing or damaged. ConfigError: two models of one name.
    """
    folders = [find_checkpoint(source) for source in config.checkpoints]
    names = config.names or [
        name_of(source, folder) for source, folder in zip(config.checkpoints, folders, strict=True)
    ]
    _check_names(names, config.checkpoints)
    served = {}
    for name, folder in zip(names, folders, strict=True):
        model = load(folder, device=config.device, dtype=config.dtype)
        served[name] = serve_model(name, folder, model, config.serve)
    return served


def serve_model(name: str, folder: Path, model: LanguageModel, settings: ServeSettings) -> Served:
    """A loaded model with an engine of its own."""
    tokenizer = tokenizer_of(model)
    engine = Engine(
        model,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        prefill_tokens=settings.prefill_tokens,
        cache_bytes=settings.cache_bytes,
        vocab_size=tokenizer.vocab_size,
        deterministic=settings.deterministic,
    )
    return Served(name=name, folder=folder, model=model, tokenizer=tokenizer, engine=engine)


def name_of(source: str, folder: Path) -> str:
    """The name of a model that was given none: its hub name, its run's, or its folder's with the run's before it."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    if (path / "checkpoints").is_dir():
        return path.resolve().name
    if folder.parent.name == "checkpoints":
        # links such as best are named as they were asked for
        return f"{folder.parent.parent.resolve().name}/{path.absolute().name}"
    return folder.resolve().name


def _check_names(names: Sequence[str], sources: Sequence[str]) -> None:
    taken: dict[str, str] = {}
    for name, source in zip(names, sources, strict=True):
        if name in taken:
            raise ConfigError(
                f"{taken[name]} and {source} would both be called {name!r}; tell them apart, as in --names=base,aligned"
            )
        if not name:
            raise ConfigError("a name is empty; clients need one to ask for the model")
        taken[name] = source


def find_served(models: Mapping[str, Served], name: str | None) -> Served | None:
    """The model of that name; without a name, the only one there is."""
    if name is None:
        return next(iter(models.values())) if len(models) == 1 else None
    return models.get(name)
