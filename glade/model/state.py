"""`State`: what a language model remembers of what it has read, as a value.

It is passed in, returned, and never kept on a module. One row per sequence (per document of a packed batch); the
layers' parts are NamedTuples of tensors whose first axis is the row, so that everything here is the same for all.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        return tensor_bytes((self.position, *(x for layer in self.layers for x in layer)))

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, whole or not at all."""
        tensors = {"position": self.position}
        for i, layer in enumerate(self.layers):
            tensors |= {f"layers.{i}.{name}": x for name, x in layer._asdict().items()}
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        kinds = [type(layer).__name__ for layer in self.layers]
        metadata = {
            "model_type": "glade_state",
            "format_version": str(FORMAT_VERSION),
            "kinds": json.dumps(kinds),
        }
        write_file_atomically(path, to_safetensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path, model: "LanguageModel | None" = None) -> "State":
        """The state that `save` wrote: on the CPU, or checked against `model` and moved to its device.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or of another model.
        """
        state = _read(Path(path))
        if model is None:
            return state
        check_state(model.init_state(0), state, str(path))
        return state.to(model.embed.weight.device)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "State":
        layers = tuple(type(layer)(*map(function, layer)) for layer in self.layers)
        return State(layers, function(self.position))


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


def _read(path: Path) -> State:
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
    try:
        kinds = [KINDS[name] for name in json.loads(metadata["kinds"])]
        layers = tuple(
            kind(*(tensors[f"layers.{i}.{field}"] for field in kind._fields)) for i, kind in enumerate(kinds)
        )
        return State(layers, tensors["position"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} lacks {error}: it is not a whole state") from error
