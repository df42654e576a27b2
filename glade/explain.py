"""An exception as one readable message: what went wrong, and what to do about it."""

import errno
import shutil
from pathlib import Path

from glade.errors import GladeError

_OUT_OF_MEMORY = (
    "out of memory. In training, raise train.accumulate (a step in more, smaller passes) first; then lower "
    "train.batch_tokens, data.context (tokens a window) or model.dim; docs/troubleshooting.md says more"
)

# what an optional part of glade is installed with, by the names that it imports
_EXTRAS = {
    "serve": ("fastapi", "gradio", "h11", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"),
    "data": ("datasets", "pyarrow", "zstandard"),
    "track": ("tensorboard", "wandb"),
}


def explain(error: BaseException) -> str:
    """One message for `error`: what went wrong and what to do, no traceback."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if is_disk_full(error):
        return disk_full(getattr(error, "filename", None))
    if isinstance(error, GladeError):
        return text
    if isinstance(error, ModuleNotFoundError) and (extra := _extra(error.name)):
        return f"{error.name} is not installed, which this needs: pip install 'glade[{extra}]'"
    if isinstance(error, FileNotFoundError):
        return f"there is no file {error.filename}" if error.filename else text
    if isinstance(error, OSError):
        return f"{error.strerror or text}: {error.filename}" if error.filename else error.strerror or text
    if _is_out_of_memory(error):
        return f"{_OUT_OF_MEMORY} ({text.strip().splitlines()[0]})" if text.strip() else _OUT_OF_MEMORY
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text}\nThis is a fault of glade; --debug shows where. Please report it."


def _extra(module: str | None) -> str | None:
    """The extra that brings a module, or None if it is no optional one."""
    package = (module or "").split(".")[0]
    return next((extra for extra, packages in _EXTRAS.items() if package in packages), None)


def is_disk_full(error: BaseException) -> bool:
    """Python says it with an errno, safetensors in the text of its own error."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "(os error 28)" in str(error)


def disk_full(path: str | Path | None) -> str:
    advice = "free some space, or write to another disk"
    if path is None:
        return f"disk full: a file could not be written; {advice}"
    place = Path(path).absolute()
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    free_mb = shutil.disk_usage(existing).free / 1e6
    return f"disk full: {place} could not be written, {free_mb:.1f} MB are free there; {advice}"


def _is_out_of_memory(error: BaseException) -> bool:
    """torch says it with its own class on an accelerator, and in the text of a RuntimeError on the CPU."""
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        phrase in said for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )
