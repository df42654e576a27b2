"""Writing files, folders and links so that a crash at any instant leaves the old one whole or the new one whole.

Everything is written under a temporary name beside its place, forced to the disk (fsync of the files, then of the
folder), and put in its place by one rename. The temporary name is fixed (`.NAME.new`), so what a killed writer left
is removed by the next one; one process writes a given place at a time.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from glade.errors import CheckpointError


def write_file_atomically(path: str | Path, content: bytes) -> None:
    """Make `path` a file of `content`."""
    path = Path(os.path.abspath(path))
    new = _sibling(path, "new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    _sync(path.parent)


def replace_link_atomically(link: str | Path, target: str | Path) -> None:
    """Make `link` a symbolic link to `target` (relative to the link's folder, if it is relative)."""
    link = Path(os.path.abspath(link))
    new = _sibling(link, "new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)
    _sync(link.parent)


def write_folder_atomically(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Make `path` the folder that `writer(folder)` fills, replacing the folder that is there.

    Where the system can swap two names in one call (Linux, macOS), `path` is at every instant the old folder or the
    new one. Elsewhere the old one is `.NAME.old` for the moment between two renames, and `whole_folder(path)` finds
    it there.

    Raises:
        CheckpointError: `path` is a link or a file.
    """
    path = Path(os.path.abspath(path))
    if path.is_symlink() or path.is_file():
        kind = "a link" if path.is_symlink() else "a file"
        raise CheckpointError(f"{path} is {kind}, and a folder is to be written there; give a folder's path")
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _sibling(path, "new"), _sibling(path, "old")
    if not path.exists() and old.exists():
        os.rename(old, path)  # a writer was killed between the two renames below
    for left_over in (new, old):
        if left_over.exists():
            shutil.rmtree(left_over)
    new.mkdir()
    writer(new)
    _sync_tree(new)
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        _sync(path.parent)
        shutil.rmtree(new)
    else:
        os.rename(path, old)
        os.rename(new, path)
        _sync(path.parent)
        shutil.rmtree(old)
    _sync(path.parent)


def whole_folder(path: str | Path) -> Path:
    """The folder `path`, or the old one that an interrupted `write_folder_atomically` left beside it."""
    path = Path(os.path.abspath(path))
    old = _sibling(path, "old")
    return old if not path.exists() and old.is_dir() else path


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}"


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(Path(root) / name, "rb+") as file:
                os.fsync(file.fileno())
        _sync(Path(root))


def _sync(folder: Path) -> None:
    """Force a folder's entries to the disk; Windows has no such call and keeps them in order itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h of macOS
# What a kernel or a file system that cannot swap answers.
_CANNOT_SWAP = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one system call; False where the system or the file system has no such call."""
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        result = libc.renamex_np(first, second, ctypes.c_uint(_RENAME_SWAP))
    elif hasattr(libc, "renameat2"):
        result = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_SWAP:
        return False
    raise OSError(number, os.strerror(number), str(b))
