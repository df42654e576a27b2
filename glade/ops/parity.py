"""How far every op x backend of this machine stands from its reference: small fixed cases, for `glade doctor`.

The tests cover far more; this is what a user can run in seconds where it matters, on the machine itself.
Linear attention has its own cases (`glade.ops.linear_attention.parity`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glade.errors import BackendError
from glade.ops.attention import BACKENDS as ATTENTION_BACKENDS
from glade.ops.attention import attention
from glade.ops.backends import Backend, choose
from glade.ops.cross_entropy import linear_cross_entropy
from glade.ops.cross_entropy import reference as cross_entropy_reference
from glade.ops.linear_attention import available_backends
from glade.ops.linear_attention import parity as linear
from glade.ops.linear_attention.dispatch import backend_for
from glade.ops.log_decay import BACKENDS as LOG_DECAY_BACKENDS
from glade.ops.log_decay import log_decay
from glade.ops.rms_norm import BACKENDS as RMS_NORM_BACKENDS
from glade.ops.rms_norm import rms_norm
from glade.ops.rnn import reference as rnn_reference
from glade.ops.rnn import rnn
from glade.ops.short_conv import BACKENDS as SHORT_CONV_BACKENDS
from glade.ops.short_conv import short_conv
from glade.ops.sigmoid import BACKENDS as SIGMOID_BACKENDS
from glade.ops.sigmoid import sigmoid
from glade.ops.swiglu import BACKENDS as SWIGLU_BACKENDS
from glade.ops.swiglu import swiglu
from glade.ops.tolerances import TOLERANCES, relative_error


class Parity(NamedTuple):
    """The worst relative errors of one backend over its cases, and whether all are within the tolerance."""

    op: str
    backend: str
    automatic: bool  # what `auto` picks for these tensors
    value_error: float
    gradient_error: float
    within: bool


class _Case(NamedTuple):
    """The same function of some leaves by backend, and the leaves in fp64."""

    by_backend: dict[str, Callable[..., Tensor]]
    leaves: Sequence[Tensor]
    automatic: str = "torch"


def measure(device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[Parity]:
    """One row for every op and backend that serves tensors of this device and dtype, the references left out."""
    names = [name for name in available_backends(device, dtype) if name != "reference"]
    for backend in names:
        yield _linear_attention(backend, device, dtype, automatic=backend == names[0])
    for op, case in _cases(device, dtype).items():
        for backend in case.by_backend:
            if backend != "reference":
                yield _plain(op, case, backend, device, dtype)


def _linear_attention(backend: str, device: torch.device, dtype: torch.dtype, automatic: bool) -> Parity:
    found: list[dict[str, float]] = []
    cu_seqlens = torch.tensor([0, 1, 40, 40, 100], dtype=torch.int32, device=device)
    for corner in linear.CORNERS.values():
        for gate in ("mild", "extreme") if corner.g != "none" else ("mild",):
            inputs = linear.make_inputs(
                corner, linear.Shape(B=1, T=100), gate=gate, dtype=dtype, cu_seqlens=cu_seqlens, device=device
            )
            found.append(linear.errors(inputs, backend, cu_seqlens))
    values = max(e for errors in found for name, e in errors.items() if name in ("o", "state"))
    gradients = max(e for errors in found for name, e in errors.items() if name not in ("o", "state"))
    within = not any(linear.failures(errors, dtype) for errors in found)
    return Parity("linear_attention", backend, automatic, values, gradients, within)


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, _Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, 40, (2, 30), generator=generator)
    return {
        "short_conv": _tabled(
            "short_conv",
            SHORT_CONV_BACKENDS,
            lambda x, w, backend: short_conv(x, w, l2norm_heads=4, backend=backend)[0],
            (normal(2, 50, 16), normal(16, 4)),
            device,
            dtype,
        ),
        "rms_norm": _tabled(
            "rms_norm",
            RMS_NORM_BACKENDS,
            lambda x, w, gate, bias, backend: rms_norm(x, w, eps=1e-5, gate=gate, gate_bias=bias, backend=backend),
            (normal(2, 50, 4, 24), normal(24), normal(2, 50, 4, 24), normal(4, 24)),
            device,
            dtype,
        ),
        "log_decay": _tabled(
            "log_decay",
            LOG_DECAY_BACKENDS,
            lambda z, rate, bias, backend: log_decay(z, rate=rate, bias=bias, backend=backend),
            (4 * normal(2, 50, 24), normal(24).exp(), normal(24)),
            device,
            dtype,
        ),
        "swiglu": _tabled(
            "swiglu",
            SWIGLU_BACKENDS,
            lambda x, backend: swiglu(x, backend=backend),
            (3 * normal(2, 50, 48),),
            device,
            dtype,
        ),
        "sigmoid": _tabled(
            "sigmoid",
            SIGMOID_BACKENDS,
            lambda x, backend: sigmoid(x, backend=backend),
            (3 * normal(2, 50, 24),),
            device,
            dtype,
        ),
        "attention": _Case(
            {
                name: lambda q, k, v, name=name: attention(q, k, v, window=20, backend=name)[0]
                for name in ATTENTION_BACKENDS
            },
            (normal(2, 50, 4, 8), normal(2, 50, 2, 8), normal(2, 50, 2, 6)),
        ),
        "rnn": _Case(
            {
                "reference": lambda x, w: rnn_reference.rnn(x, w, "tanh", None, None)[0],
                "torch": lambda x, w: rnn(x, w)[0],
            },
            (normal(2, 30, 8), normal(8, 8) / 4),
        ),
        "cross_entropy": _Case(
            {
                "reference": lambda x, w: cross_entropy_reference.linear_cross_entropy(
                    x, w, targets.to(x.device), None
                ),
                "torch": lambda x, w: linear_cross_entropy(x, w, targets.to(x.device)),
            },
            (normal(2, 30, 16), normal(40, 16)),
        ),
    }


def _tabled(
    op: str,
    table: Mapping[str, Backend],
    run: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> _Case:
    """A case of an op with a table of backends: those that serve this device and dtype."""
    able = [name for name, row in table.items() if row.refuses(device, dtype) is None]
    by_backend = {name: lambda *x, name=name: run(*x, backend=name) for name in able}
    return _Case(by_backend, leaves, choose(op, table, "auto", device, dtype))


def _plain(op: str, case: _Case, backend: str, device: torch.device, dtype: torch.dtype) -> Parity:
    rounded = [x.to(device=device, dtype=dtype) for x in case.leaves]
    exact = _with_gradients(case.by_backend["reference"], [x.double() for x in rounded])
    found = _with_gradients(case.by_backend[backend], rounded)
    errors = [relative_error(x, y) for x, y in zip(found, exact, strict=True)]
    tolerance = TOLERANCES[dtype]
    within = errors[0] <= tolerance.value and max(errors[1:]) <= tolerance.gradient
    return Parity(op, backend, backend == case.automatic, errors[0], max(errors[1:]), within)


def _with_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


def unavailable(device: torch.device, dtype: torch.dtype, names: Sequence[str]) -> dict[str, str]:
    """Why each of the named backends of linear attention cannot serve these tensors."""
    reasons = {}
    for name in names:
        try:
            backend_for(name, device, dtype)
        except BackendError as error:
            reasons[name] = str(error)
    return reasons
