"""Small files, read and written with errors that a user can act on."""

import json
import os
from pathlib import Path
from typing import Any

from glade.errors import DataError


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        DataError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); the file is damaged") from error


def write_text(path: Path, text: str) -> None:
    """Writes a small UTF-8 file and waits until it is on the disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """Waits until an open file's bytes are on the disk."""
    os.fsync(descriptor)
