"""Weights of 8 bits for inference: every matrix of a model as whole numbers with one scale a row.

    W[i, j] ~ scale[i] * n[i, j],   scale[i] = max_j |W[i, j]| / 127,   n = round(W / scale) in -127 .. 127

A quarter of fp32's bytes, so a quarter of the time where a token is bound by reading the weights. Norms, biases,
convolutions, decay constants and position tables stay as they are. Nothing here trains: round after training.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glade.errors import ConfigError
from glade.model.ffn import MoE
from glade.model.lm import LanguageModel

_LEVELS = 127
_aten = torch.ops.aten


class Int8Weight(Tensor):
    """A matrix [rows, columns] held as int8 `values` and fp32 `scales` [rows]; to torch it is of the dtype it was.

    Any op computes with `dequantized()`, which is made for that op and dropped; only looking up rows of a table, moving
    and copying do without. The native decode step reads the 8 bits themselves.
    """

    values: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor, dtype: torch.dtype) -> "Int8Weight":
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)
        made.values, made.scales = values, scales
        return made

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """`weight` [rows, columns], rounded."""
        wide = weight.detach().float()
        scales = wide.abs().amax(-1) / _LEVELS
        values = (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-_LEVELS, _LEVELS)
        return cls(values.to(torch.int8), scales, weight.dtype)

    def dequantized(self) -> Tensor:
        return (self.values.float() * self.scales[:, None]).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["values", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> "Int8Weight":
        return Int8Weight(inner["values"], inner["scales"], dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None and isinstance(args[0], cls):
            return own(*args, **kwargs)
        return func(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()})


def _plain(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    return x.dequantized() if isinstance(x, Int8Weight) else x


def _look_up(weight: Int8Weight, ids: Tensor, *unused: Any) -> Tensor:
    return (weight.values[ids].float() * weight.scales[ids][..., None]).to(weight.dtype)


def _moved(weight: Int8Weight, dtype: torch.dtype | None = None, device: Any = None, **unused: Any) -> Int8Weight:
    return Int8Weight(weight.values.to(device), weight.scales.to(device), dtype or weight.dtype)


def _as_it_is(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(weight.values, weight.scales, weight.dtype)


def _copied(weight: Int8Weight, **unused: Any) -> Int8Weight:
    return Int8Weight(weight.values.clone(), weight.scales.clone(), weight.dtype)


_OWN: dict[Any, Callable[..., Tensor]] = {
    _aten.embedding.default: _look_up,
    _aten._to_copy.default: _moved,
    _aten.detach.default: _as_it_is,
    _aten.alias.default: _as_it_is,
    _aten.clone.default: _copied,
}


def quantize(model: LanguageModel) -> LanguageModel:
    """`model` itself with its matrices in 8 bits: every linear map, the token table and the head.

    Raises:
        ConfigError: the model has experts, whose stacked weights are not rounded.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            raise ConfigError("int8 does not know a mixture of experts; use dtype bfloat16 or float32")
        if module is not model.positions and isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(Int8Weight.of(module.weight), requires_grad=False)
    return model


def is_quantized(model: LanguageModel) -> bool:
    return isinstance(model.embed.weight, Int8Weight)
