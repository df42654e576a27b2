"""The checkpoint folder: one model, everything it takes to use it, nothing that runs code when loaded.

    model.safetensors        weights, tied ones once
    config.json              the resolved ModelConfig, with "model_type": "glade" and "format_version"
    tokenizer.json, tokenizer_config.json            if a tokenizer was given
    training_metadata.json   whatever the trainer knows: data, credit, steps, results
    README.md                the model card

Written by `write_folder_atomically`; optimisers and data positions are the trainer's, not here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glade.errors import CheckpointError, ConfigError
from glade.model.atomic import whole_folder, write_folder_atomically
from glade.model.card import model_card
from glade.model.config import ModelConfig

if TYPE_CHECKING:
    from glade.model.lm import LanguageModel

MODEL_TYPE = "glade"
FORMAT_VERSION = 1
WEIGHTS, CONFIG, METADATA, CARD = "model.safetensors", "config.json", "training_metadata.json", "README.md"
FILES = {WEIGHTS, CONFIG, METADATA, CARD, "tokenizer.json", "tokenizer_config.json"}


class Saveable(Protocol):
    """What a tokenizer must answer to travel with a checkpoint."""

    def save(self, folder: Path) -> object: ...


def write_checkpoint(
    model: "LanguageModel",
    folder: str | Path,
    tokenizer: Saveable | None = None,
    training_metadata: Mapping[str, Any] | None = None,
) -> None:
    """Make `folder` the checkpoint of `model`: the one that was there, or the new one, whole, at every instant.

    Raises:
        CheckpointError: `folder` is a file or a link, or holds files that are not a checkpoint's (they would be lost).
    """
    folder = Path(folder)
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES) if folder.is_dir() else []
    if others:
        raise CheckpointError(
            f"{folder} holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}, and saving a checkpoint "
            "replaces the whole folder; give a new folder, or one that holds a checkpoint alone"
        )
    write_folder_atomically(folder, lambda new: write_checkpoint_files(model, new, tokenizer, training_metadata))


def write_checkpoint_files(
    model: "LanguageModel",
    folder: Path,
    tokenizer: Saveable | None = None,
    training_metadata: Mapping[str, Any] | None = None,
) -> None:
    """The files of a checkpoint into an existing folder, which the caller makes atomic (a trainer's step folder)."""
    metadata = dict(training_metadata or {})
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **model.config.to_dict()}
    _write_json(folder / CONFIG, config)
    _write_json(folder / METADATA, metadata)
    (folder / CARD).write_text(model_card(model, metadata), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def read_checkpoint(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights (on the CPU) of a checkpoint folder.

    Raises:
        CheckpointError: the folder or a file of it is missing, damaged, of another kind or of another version.
    """
    folder = whole_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    return _read_config(folder / CONFIG), _read_weights(folder / WEIGHTS)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """`training_metadata.json` of a checkpoint folder. Raises CheckpointError as `read_checkpoint` does."""
    return _read_json(whole_folder(folder) / METADATA)


def load_weights(model: "LanguageModel", tensors: Mapping[str, Tensor], name: str) -> None:
    """Give `model` (which may be on the meta device) these weights; `name` says where they are from.

    Raises:
        CheckpointError: names or shapes are not this model's.
    """
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"the weights in {name} are not those its config describes: "
            f"missing {_some(missing)}; not expected {_some(extra)}"
        )
    for key, x in tensors.items():
        if x.shape != expected[key].shape:
            raise CheckpointError(
                f"{key} in {name} has shape {list(x.shape)}; its config describes {list(expected[key].shape)}"
            )
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def _read_config(path: Path) -> ModelConfig:
    values = _read_json(path)
    model_type, version = values.pop("model_type", None), values.pop("format_version", None)
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{path} says model_type {model_type!r}, not {MODEL_TYPE!r}; glade.load reads checkpoints of other programs"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this version of glade reads {FORMAT_VERSION}")
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path} is not a model config of this version of glade: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; the checkpoint is not complete")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); it may have been cut short, copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path}; the checkpoint is not complete") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; a mapping of keys to values was expected")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    return (", ".join(names[:4]) or "nothing") + (f" and {len(names) - 4} more" if len(names) > 4 else "")
