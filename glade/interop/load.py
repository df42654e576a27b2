"""Find the model that a path or a hub name stands for. Only glade's own checkpoints are read here."""

import json
from pathlib import Path
from typing import Any, cast

import torch

from glade.data.tokenizer import Tokenizer
from glade.errors import CheckpointError, ConfigError
from glade.model.atomic import whole_folder
from glade.model.lm import LanguageModel
from glade.model.quantized import quantize

_UNDERSTOOD = (
    "understood are a glade checkpoint (config.json with model_type glade, and model.safetensors), "
    "its model.safetensors, and a run folder (with checkpoints/ in it)"
)
# weights, settings, tokenizer and card: never a pickle
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.md"]


def load(
    src: str | Path,
    checkpoint: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LanguageModel:
    """A trained model in evaluation mode, its tokenizer at `.tokenizer`.

        model = glade.load("runs/demo")
        print(glade.generate(model, "ROMEO:"))

    Args:
        src: a checkpoint folder, the model.safetensors in one, a run folder, or the name of a Hugging Face
            repository that holds a checkpoint folder. What exists on this disk comes first.
        checkpoint: which one of a run folder, as `step-2000` or `last`; default `best`, then `last`
        revision: branch, tag or commit of a hub repository
        device: default the CPU; `auto` takes the accelerator if there is one
        dtype: of the weights, as `bfloat16`; default the checkpoint's own. `int8`: the checkpoint's own, with every
            matrix rounded to 8 bits (`glade.model.quantized`)
    Raises:
        CheckpointError: nothing there, or not a glade checkpoint; the message lists what was found.
        ConfigError: an argument that does not fit the source, or a device or dtype that does not exist.
    """
    folder = find_checkpoint(src, checkpoint, revision)
    rounded = dtype in ("int8", torch.int8)
    model = LanguageModel.from_pretrained(
        folder, device=find_device(device), dtype=None if rounded else find_dtype(dtype)
    )
    if rounded:
        quantize(model)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > cast(int, model.config.vocab_size):
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; they are not of one training run"
        )
    # a property of what was loaded, not of the architecture, so the class does not declare it
    cast(Any, model).tokenizer = tokenizer
    return model


def find_checkpoint(src: str | Path, checkpoint: str | None = None, revision: str | None = None) -> Path:
    """The checkpoint folder that `src` stands for, downloaded if it is a hub name; arguments as for `load`."""
    path = whole_folder(Path(src).expanduser())
    if path.exists() and revision is not None:
        raise ConfigError(f"revision {revision!r} is for a hub name; {src} is on this disk")
    if path.is_file():
        path = _folder_of(path)
    elif not path.exists():
        path = _download(str(src), revision)
    if (path / "checkpoints").is_dir():
        return _in_run(path, checkpoint)
    if checkpoint is not None:
        raise ConfigError(f"checkpoint {checkpoint!r} chooses one of a run folder; {src} has no checkpoints/ in it")
    return _checked(path)


def _in_run(run: Path, checkpoint: str | None) -> Path:
    for name in ("best", "last") if checkpoint is None else (checkpoint,):
        # best and last are links that a running trainer moves: followed once, so that all files are of one step
        folder = whole_folder((run / "checkpoints" / name).resolve())
        if folder.is_dir():
            return _checked(folder)
    found = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    wanted = "best or last" if checkpoint is None else checkpoint
    raise CheckpointError(f"{run / 'checkpoints'} has no {wanted}; it has {', '.join(found) or 'none yet'}")


def _folder_of(file: Path) -> Path:
    if file.name != "model.safetensors":
        raise CheckpointError(f"{file} is a file that load does not read; {_UNDERSTOOD}")
    return file.parent


def _checked(folder: Path) -> Path:
    """`folder` if it says that it is a glade checkpoint; whether it is a sound one is for the model to say."""
    config = folder / "config.json"
    if not config.is_file():
        found = sorted(path.name for path in folder.iterdir())
        listed = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
        raise CheckpointError(f"{folder} is no model: it holds {listed or 'nothing'}; {_UNDERSTOOD}")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged: not a JSON object ({error})") from error
    if model_type != "glade":
        raise CheckpointError(f"{config} is of model_type {model_type!r}, which load does not read; {_UNDERSTOOD}")
    return folder


def _download(name: str, revision: str | None) -> Path:
    """The repository `name` of the Hugging Face hub in its local cache."""
    # imported here: a model on this disk should not pay for it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise CheckpointError(f"{name} does not exist on this disk; {_UNDERSTOOD}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{name} does not exist on this disk, and the Hugging Face hub did not give it: {reason}"
        ) from error


def find_device(device: str | torch.device | None) -> torch.device:
    """The device that a setting names; None is the CPU, `auto` the accelerator if there is one."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(device or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}; cpu always can") from error
    return found


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating dtype that a setting names; None stays None."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {str(dtype)!r} is no floating dtype; give float32, bfloat16, float16 or float64")
    return found
