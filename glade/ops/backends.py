"""Which code runs a call of an op: device and dtype in, backend out, by one table an op. Nothing else is consulted.

A named backend runs exactly that or raises `BackendError`, which names one that can; "auto" takes the first row that
serves the device and dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from glade.errors import BackendError


def serves_all(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def never(*_: Any) -> Any:
    """The call of a backend that is not installed: its `refuses` lets nothing through to here."""
    raise AssertionError("a backend that refuses all calls was called")


class Backend(NamedTuple):
    run: Callable[..., Any]
    # why this device and dtype cannot be served, or None if they can
    refuses: Callable[[torch.device, torch.dtype], str | None] = serves_all
    automatic: bool = True


def choose(op: str, table: Mapping[str, Backend], name: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The name of the row of `table` that runs a call of `op` on `device` with tensors of `dtypes`.

    Raises:
        BackendError: no such backend, or it cannot serve this device and dtype.
    """
    if name == "auto":
        return next(n for n, b in table.items() if b.automatic and _refusal(b, device, dtypes) is None)
    reasons = {n: _refusal(b, device, dtypes) for n, b in table.items()}
    able = [n for n, reason in reasons.items() if reason is None]
    if name not in table:
        raise BackendError(f"{op} has no backend '{name}'; use 'auto' or one of {sorted(table)}")
    if name not in able:
        raise BackendError(f"backend '{name}' of {op} {reasons[name]}. Use {' or '.join(map(repr, able))}, or 'auto'")
    return name


def _refusal(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    return next((reason for dtype in dtypes if (reason := backend.refuses(device, dtype)) is not None), None)
