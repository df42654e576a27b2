"""The weights a run starts from: fresh ones, those it stopped with, or (parts of) another checkpoint's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glade import config as settings
from glade.data.tokenizer import Tokenizer
from glade.errors import CheckpointError, ConfigError
from glade.interop.load import find_checkpoint
from glade.model.checkpoint import load_weights, read_checkpoint
from glade.model.lm import LanguageModel
from glade.train.align_config import DpoRun, SftRun
from glade.train.config import TrainRun
from glade.train.resume import newest_run, saved_config


def resumed(overrides: Mapping[str, Any], kind: type[Any] = TrainRun) -> Any:
    """With `--resume`, the saved config of the run, to which this command's other settings are applied; it no longer
    stops where it was told to before.

    Raises:
        CheckpointError: there is nothing to resume.
    """
    if str(overrides["resume"]).lower() == "false":
        return None
    named = overrides.get("run")
    folder = newest_run() if named is None else Path(str(named))
    if not (folder / "checkpoints" / "last").is_dir():
        raise CheckpointError(f"{folder} has no checkpoints/last to resume from; start it without --resume")
    return settings.replace(saved_config(kind, folder), {"run": str(folder), "train.stop_after": None})


def resumed_sft(overrides: Mapping[str, Any]) -> Any:
    """`resumed` for `glade sft`."""
    return resumed(overrides, SftRun)


def resumed_dpo(overrides: Mapping[str, Any]) -> Any:
    """`resumed` for `glade dpo`."""
    return resumed(overrides, DpoRun)


def initialised(overrides: Mapping[str, Any]) -> TrainRun | None:
    """With `--train.init_from` of a whole checkpoint, its model and its tokenizer, to which settings are applied.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if "train.init_parts" in overrides:
        return None
    folder = find_checkpoint(str(overrides["train.init_from"]))
    model, _ = read_checkpoint(folder)
    return settings.replace(TrainRun(), {"model": model, "data.tokenizer": str(folder / "tokenizer.json")})


def starting_model(config: TrainRun, run: Path, tokenizer: Tokenizer) -> tuple[LanguageModel, str]:
    """The model with its first weights, and a line that says what was copied ("" if nothing).

    Random numbers are drawn for every weight, whatever is then replaced: what else a seed decides stays the same.

    Raises:
        CheckpointError, ConfigError: what is to be copied is missing, or has no place in this model.
    """
    model = LanguageModel(config.model)
    if config.resume:
        saved, tensors = read_checkpoint(run / "checkpoints" / "last")
        load_weights(model, tensors, str(run / "checkpoints" / "last"))
        return model, ""
    if config.train.init_from is None:
        return model, ""
    folder = find_checkpoint(config.train.init_from)
    saved, tensors = read_checkpoint(folder)
    if saved.dim == config.model.dim and (folder / "tokenizer.json").is_file():
        _check_tokenizer(config, tokenizer, folder)
    if not config.train.init_parts:
        load_weights(model, tensors, f"{folder}, read into this run's model,")
        return model, f"all weights from {folder}"
    return model, _copy_parts(model, tensors, config.train.init_parts, folder)


def _check_tokenizer(config: TrainRun, tokenizer: Tokenizer, folder: Path) -> None:
    parts = config.train.init_parts
    if parts and not any("embed".startswith(part) or part.startswith("embed") for part in parts):
        return
    if Tokenizer.load(folder).digest() != tokenizer.digest():
        raise ConfigError(
            f"the embeddings in {folder} belong to another tokenizer than data.tokenizer={config.data.tokenizer}; "
            f"set --data.tokenizer={folder / 'tokenizer.json'}"
        )


def _copy_parts(model: LanguageModel, tensors: dict[str, torch.Tensor], parts: tuple[str, ...], folder: Path) -> str:
    own = model.state_dict()
    copied = []
    for part in parts:
        names = [name for name in tensors if name.startswith(part)]
        if not names:
            raise ConfigError(f"train.init_parts: no weight in {folder} starts with {part!r}; it has {_some(tensors)}")
        for name in names:
            if name not in own:
                raise CheckpointError(f"{name} of {folder} has no place in this model, which has {_some(own)}")
            if own[name].shape != tensors[name].shape:
                raise CheckpointError(
                    f"{name} is {list(tensors[name].shape)} in {folder} and {list(own[name].shape)} in this model"
                )
        copied += names
    with torch.no_grad():
        for name in copied:
            own[name].copy_(tensors[name])
    return f"{len(copied)} of {len(own)} weights from {folder}: {', '.join(copied[:4])}{', ...' if copied[4:] else ''}"


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
