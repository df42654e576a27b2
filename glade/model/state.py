"""`State`: what a language model remembers of what it has read, as a value.

It is passed in, returned, and never kept on a module. One row per sequence (per document of a packed batch); the
layers' parts are NamedTuples of tensors whose first axis is the row, so that everything here is the same for all.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from glade.errors import CheckpointError
from glade.model.atomic import write_file_atomically
from glade.model.mixer import tensor_bytes
from glade.model.mixers.linear import LinearState
from glade.model.mixers.rnn import RnnState
from glade.ops import AttentionState

if TYPE_CHECKING:
    from glade.model.lm import LanguageModel

FORMAT_VERSION = 1
_SAMPLED_WEIGHTS = 64  # of every parameter
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (LinearState, AttentionState, RnnState)}


@dataclass(slots=True)
class State:
    """The state of every layer after `position` tokens.

    layers:       one NamedTuple of tensors per layer
    position:     [B] int64, tokens seen by each row
    load_balance: the mixture-of-experts loss of the forward that returned this state, already multiplied by
                  `ModelConfig.load_balance` (add it to the training loss); None without experts. It belongs to that
                  forward: it is not carried on, copied or saved.
    """

    layers: tuple[Any, ...]
    position: Tensor
    load_balance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.position)

    def select(self, rows: Tensor | list[int]) -> "State":
        """The given rows, copied, in the given order; a row may be asked for twice (that is a fork)."""
        index = torch.as_tensor(rows, device=self.position.device)
        index = index.nonzero().squeeze(-1) if index.dtype == torch.bool else index.to(torch.int64)
        return self._map(lambda x: x.index_select(0, index))

    def clone(self) -> "State":
        return self._map(Tensor.clone)

    def detach(self) -> "State":
        """The same values, cut from the graph: truncated back-propagation through time."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> "State":
        return self._map(lambda x: x.to(device))

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.tensors())

    def save(
        self,
        path: str | Path,
        *,
        model: "LanguageModel | None" = None,
        tokens: Sequence[int] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write the state to one safetensors file, whole or not at all.

        Args:
            model:  what the state is of; a file that knows it cannot be loaded into another one
            tokens: what the one row has read, to go with it
            notes:  anything else, by name
        """
        tensors = {"position": self.position}
        for i, layer in enumerate(self.layers):
            tensors |= {f"layers.{i}.{name}": x for name, x in layer._asdict().items()}
        if tokens is not None:
            if self.position.tolist() != [len(tokens)]:
                raise ValueError(f"{len(tokens)} tokens for rows that have read {self.position.tolist()}")
            tensors["tokens"] = torch.tensor(tokens, dtype=torch.int64)
        metadata = {
            "model_type": "glade_state",
            "format_version": str(FORMAT_VERSION),
            "kinds": json.dumps([type(layer).__name__ for layer in self.layers]),
            "notes": json.dumps(dict(notes or {})),
        }
        if model is not None:
            metadata["config"] = _config_digest(model)
            tensors["weights"] = _weight_sample(model)
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        write_file_atomically(path, to_safetensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path, model: "LanguageModel | None" = None) -> "State":
        """The state that `save` wrote: on the CPU, or checked against `model` and in its dtypes, on its device.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or of another model.
        """
        return read_state_file(path, model).state

    def tensors(self) -> tuple[Tensor, ...]:
        """The position, and the layers' tensors in order."""
        return (self.position, *(x for layer in self.layers for x in layer))

    def with_tensors(self, tensors: Iterable[Tensor]) -> "State":
        """A state of the same kinds of layers with these in the place of its `tensors`."""
        position, *fields = tensors
        left = iter(fields)
        return State(tuple(type(layer)(*(next(left) for _ in layer)) for layer in self.layers), position)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "State":
        return self.with_tensors(map(function, self.tensors()))


def check_state(expected: State, given: State, name: str) -> None:
    """CheckpointError unless `given` has the layers of `expected` (a state of the model, of any number of rows)."""
    kinds, wanted = ([type(layer).__name__ for layer in s.layers] for s in (given, expected))
    if kinds != wanted:
        raise CheckpointError(f"{name} holds the layers {kinds}, this model has {wanted}: it is of another model")
    for i, (layer, like) in enumerate(zip(given.layers, expected.layers, strict=True)):
        for field, x, y in zip(layer._fields, layer, like, strict=True):
            # how much of the past a cache of keys and values holds is not the model's, all else is
            first = 2 if isinstance(layer, AttentionState) and x.dim() > 2 else 1
            if x.shape[first:] != y.shape[first:] or x.dim() != y.dim() or len(x) != len(given.position):
                raise CheckpointError(
                    f"{name} has {field} {list(x.shape)} in layer {i}; this model makes {list(y.shape)} there, with "
                    f"{len(given.position)} rows: it is of another model"
                )


class StateFile(NamedTuple):
    """What a state file holds."""

    state: State
    tokens: list[int] | None  # what its one row has read, if that was saved
    notes: dict[str, str]


def read_state_file(path: str | Path, model: "LanguageModel | None" = None) -> StateFile:
    """All that `State.save` wrote, checked against `model` if one is given, and in its dtypes, on its device.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or of another model.
    """
    metadata, tensors = _read(Path(path))
    state, notes = _state_of(Path(path), metadata, tensors), json.loads(metadata.get("notes", "{}"))
    tokens = tensors["tokens"].tolist() if "tokens" in tensors else None
    if model is None:
        return StateFile(state, tokens, notes)
    like = model.init_state(0)
    check_state(like, state, str(path))
    if "weights" in tensors:
        _check_identity(model, metadata.get("config"), tensors["weights"], str(path))
    device = model.embed.weight.device
    layers = tuple(
        type(layer)(*(x.to(device, y.dtype) for x, y in zip(layer, there, strict=True)))
        for layer, there in zip(state.layers, like.layers, strict=True)
    )
    return StateFile(State(layers, state.position.to(device)), tokens, notes)


def _config_digest(model: "LanguageModel") -> str:
    config = json.dumps(asdict(model.config), sort_keys=True, default=str)
    return hashlib.sha256(config.encode()).hexdigest()


def _weight_sample(model: "LanguageModel") -> Tensor:
    """A few numbers of every parameter, fp32: they tell a model from what fine-tuning made of it, at no cost."""
    samples = []
    for _, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(len(flat) // _SAMPLED_WEIGHTS, 1)
        samples.append(flat[::step][:_SAMPLED_WEIGHTS].float().cpu())
    return torch.cat(samples)


def _check_identity(model: "LanguageModel", config: str | None, weights: Tensor, name: str) -> None:
    """CheckpointError unless the file is of this model, its weights in whatever precision."""
    own = _weight_sample(model)
    if config != _config_digest(model) or own.shape != weights.shape:
        raise CheckpointError(f"{name} is the state of a model with another config; load that model")
    # one model in two precisions differs by the coarser one's rounding, 2^-9 in bf16
    if not torch.allclose(own, weights, rtol=2**-8, atol=1e-6):
        raise CheckpointError(f"{name} is the state of a model with other weights; load the model it was made with")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a state file of this version."""
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no state file {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may have been cut short"
        ) from error
    if metadata.get("model_type") != "glade_state":
        raise CheckpointError(f"{path} is a safetensors file, but not a state that State.save wrote")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        version = metadata.get("format_version")
        raise CheckpointError(f"{path} has state format {version}; this version of glade reads {FORMAT_VERSION}")
    return metadata, tensors


def _state_of(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> State:
    try:
        kinds = [KINDS[name] for name in json.loads(metadata["kinds"])]
        layers = tuple(
            kind(*(tensors[f"layers.{i}.{field}"] for field in kind._fields)) for i, kind in enumerate(kinds)
        )
        return State(layers, tensors["position"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} lacks {error}: it is not a whole state") from error
