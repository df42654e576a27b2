"""A model's weights in the dtype of autocast, cast together at the start of a pass.

autocast casts each weight by a kernel of its own, and its gradient back; and maps that are joined have their weights
laid end to end in fp32 first, another kernel that moves more bytes than the cast. Here all are cast by a few kernels,
each to where it lies beside those that it is joined with. The numbers are the same: a weight is rounded once, and so is
its gradient, by the product that makes it. Where a pass reads a weight twice, the two gradients are added before they
are cast back, as autocast's cache has it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from glade.model.ffn import SwiGLU
from glade.model.lm import LanguageModel
from glade.model.mixer import Mixer
from glade.ops.many import copy_all


def cast_weights(model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """name -> the weight in `dtype`, of every trained fp32 linear map of the blocks. Differentiable."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    groups = [[m.weight for m in group] for group in _groups(model)]
    weights = list(chain(*groups))
    if not weights:
        return {}
    copies: tuple[Tensor, ...] = _Cast.apply(dtype, [len(group) for group in groups], *weights)  # type: ignore[assignment]
    return {names[w]: copy for w, copy in zip(weights, copies, strict=True)}


def reading(model: LanguageModel, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model with these in the place of its own."""
    if not weights:
        return model
    return lambda *args, **kwargs: functional_call(model, dict(weights), args, kwargs)


class _Cast(torch.autograd.Function):
    """Weights [n_i, m], so many in each group; the copies of a group lie end to end."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, groups: Sequence[int], *weights: Tensor):
        ctx.set_materialize_grads(False)
        copies, rest = [], iter(weights)
        for size in groups:
            group = [next(rest) for _ in range(size)]
            lengths = [len(w) for w in group]
            copies += group[0].new_empty(sum(lengths), *group[0].shape[1:], dtype=dtype).split(lengths)
        copy_all(copies, weights)
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        reached = [d for d in gradients if d is not None]
        wide = [torch.empty_like(d, dtype=torch.float32) for d in reached]
        copy_all(wide, reached)
        rest = iter(wide)
        return None, None, *(None if d is None else next(rest) for d in gradients)


def _groups(model: LanguageModel) -> Iterator[list[nn.Linear]]:
    """The maps to cast: those that are joined together, every other one alone."""
    found: set[Tensor] = set()
    for block in model.blocks():
        joined = [m.joined_maps() for m in block.modules() if isinstance(m, Mixer | SwiGLU)]
        alone = ((m,) for m in block.modules() if type(m) is nn.Linear)
        for maps in chain(joined, alone):
            group = [m for m in maps if _is_cast(m) and m.weight not in found]
            found.update(m.weight for m in group)
            if group:
                yield group


def _is_cast(m: nn.Linear) -> bool:
    """An adapted map, or a quantised weight, is read in its own way."""
    weight = m.weight
    return (
        type(m) is nn.Linear and type(weight) is nn.Parameter and weight.requires_grad and weight.dtype == torch.float32
    )
