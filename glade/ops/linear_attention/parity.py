"""How far a backend of linear attention stands from the fp64 token loop: cases, inputs and the comparison.

Used by the tests and by `glade doctor`; it decides nothing, it measures. Tolerances: `glade.ops.tolerances`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from glade.ops.linear_attention import linear_attention
from glade.ops.tolerances import TOLERANCES, relative_error


class Corner(NamedTuple):
    """Which gates a mixer has: each is "none", "scalar" (one per head) or "vector" (one per channel)."""

    g: str
    erase: str
    write: str


CORNERS = {
    "linear": Corner("none", "none", "none"),
    "scalar-decay": Corner("scalar", "none", "none"),
    "gla": Corner("vector", "none", "none"),
    "delta": Corner("none", "scalar", "scalar"),
    "gdn": Corner("scalar", "scalar", "scalar"),
    "kda": Corner("vector", "scalar", "scalar"),
    "gdn2": Corner("vector", "vector", "vector"),
}

# how strongly the state decays: a step or two of e-folding, e^-20 a step, all channels at -5, a twentieth at -1e4
GATES = ("mild", "strong", "saturated", "extreme")


class Shape(NamedTuple):
    B: int = 2
    T: int = 64
    H: int = 2
    HV: int = 4
    K: int = 8
    V: int = 6


def log_decay(kind: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp64 log decays of one of `GATES`."""
    where: dict[str, Any] = dict(dtype=torch.float64, device=generator.device)
    uniform = torch.rand(size, generator=generator, **where)
    if kind == "mild":
        return logsigmoid(torch.randn(size, generator=generator, **where) + 2)
    if kind == "strong":
        return -20 * uniform
    if kind == "saturated":
        return torch.full(size, -5.0, **where)
    assert kind == "extreme", kind
    return torch.where(uniform < 0.05, -1e4, -0.1 * uniform)


def make_inputs(
    corner: Corner,
    shape: Shape,
    *,
    gate: str = "mild",
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    given_state: bool = True,
    device: torch.device | str = "cpu",
    drawn_on: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The tensors of one call by argument name: unit keys, erase and write in (0, 1), g of the given kind (in fp32, or
    `gate_dtype`), all rounded to the dtype they are passed in.

    Drawn on the CPU they are the same numbers for every device; for a shape of millions of numbers that takes seconds.
    """
    B, T, H, HV, K, V = shape
    generator = torch.Generator(drawn_on).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=drawn_on)

    def gate_of(kind: str, channels: int, values) -> Tensor | None:
        return None if kind == "none" else values((B, T, HV) if kind == "scalar" else (B, T, HV, channels))

    def unit(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64, device=drawn_on)

    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: dict[str, Any] = {
        "q": normal(B, T, H, K).to(dtype),
        "k": normalize(normal(B, T, H, K), dim=-1).to(dtype),
        "v": normal(B, T, HV, V).to(dtype),
        "g": gate_of(corner.g, K, lambda size: log_decay(gate, size, generator)),
        "erase": gate_of(corner.erase, K, unit),
        "write": gate_of(corner.write, V, unit),
        "state": normal(rows, HV, K, V).to(wide) if given_state else None,
    }
    dtypes = {"g": gate_dtype or wide, "erase": gate_dtype or dtype, "write": gate_dtype or dtype}
    inputs |= {name: inputs[name] if inputs[name] is None else inputs[name].to(d) for name, d in dtypes.items()}
    return {name: x if x is None else x.to(device) for name, x in inputs.items()}


def run_with_gradients(
    inputs: dict[str, Any],
    backend: str,
    cu_seqlens: Tensor | None = None,
    seed: int = 1,
    drawn_on: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """o, the final state, and the gradients ("dq", ...) of a fixed random linear function of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if x is not None}
    optional = {name: leaves.get(name) for name in ("g", "erase", "write", "state")}
    o, state = linear_attention(
        leaves["q"], leaves["k"], leaves["v"], **optional, cu_seqlens=cu_seqlens, backend=backend
    )
    generator = torch.Generator(drawn_on).manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64, device=drawn_on) for x in (o, state)]
    # rounded as the backward will see them, so that both backends differentiate the same function
    weights = [w.to(inputs["v"].dtype).to(x) for w, x in zip(weights, (o, state), strict=True)]
    # without tokens and without a given state, an output depends on nothing
    live = [(x, w) for x, w in zip((o, state), weights, strict=True) if x.requires_grad]
    gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if live:
        outputs, weights = zip(*live, strict=True)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    named = {f"d{name}": torch.zeros_like(x) if dx is None else dx
             for (name, x), dx in zip(leaves.items(), gradients, strict=True)}  # fmt: skip
    return {"o": o.detach(), "state": state.detach(), **named}


def errors(inputs: dict[str, Any], backend: str, cu_seqlens: Tensor | None = None) -> dict[str, float]:
    """The relative error of every output and gradient of `backend` against the token loop in fp64."""
    return errors_between(inputs, backend, "reference", cu_seqlens)


def errors_between(
    inputs: dict[str, Any],
    backend: str,
    exact_backend: str,
    cu_seqlens: Tensor | None = None,
    drawn_on: torch.device | str = "cpu",
) -> dict[str, float]:
    """The same against `exact_backend` in fp64: for sequences too long for the token loop's saved states."""
    exact_inputs = {name: x if x is None else x.double() for name, x in inputs.items()}
    exact = run_with_gradients(exact_inputs, exact_backend, cu_seqlens, drawn_on=drawn_on)
    found = run_with_gradients(inputs, backend, cu_seqlens, drawn_on=drawn_on)
    scales = {"dg": gate_gradient_scale(exact_inputs, exact)} if "dg" in exact else {}
    return {name: relative_error(x, exact[name], scales.get(name)) for name, x in found.items()}


def failures(found: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Those of `errors` that are beyond the tolerance of inputs of `dtype`."""
    tolerance = TOLERANCES[dtype]
    # the state stays in fp32 whatever the inputs are, but is made of products of rounded inputs: one limit for both
    return {
        name: error
        for name, error in found.items()
        if not error <= (tolerance.value if name in ("o", "state") else tolerance.gradient)
    }


def gate_gradient_scale(inputs: dict[str, Any], exact: dict[str, Tensor]) -> float:
    """The largest of the terms that a gate's gradient is the difference of (summed over channels for a scalar gate)."""
    terms = [inputs[x] * exact[f"d{x}"] for x in ("q", "k", "erase") if inputs[x] is not None]
    if inputs["g"].dim() == 3:
        terms = [x.abs().sum(-1) if x.dim() == 4 else x for x in terms]
    return max(x.abs().max().item() for x in terms) if terms[0].numel() else 1.0
