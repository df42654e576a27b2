"""What a mixer must answer; the model knows its mixers by this and nothing else.

A mixer moves information between tokens. Its state is a NamedTuple of tensors whose first axis is the row (a
sequence, or a document of a packed batch), passed in and returned, never kept on the module.

Ownership: `forward` never writes into the state it is given, so a state may be kept, forked and differentiated
through. `step_`, the decode step, owns the state it is given and updates its tensors in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.ops.parts import split
from glade.ops.together import together


class Mixer(nn.Module, ABC):
    """y_t = f(x_0 .. x_t), within a document."""

    o_proj: nn.Linear  # the map that writes into the residual stream
    state_type: type  # of what `forward` returns and takes

    @abstractmethod
    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, *, return_state: bool = True
    ) -> tuple[Tensor, Any]:
        """Whole sequences.

        Args:
            x:          [B, T, D]
            state:      what a former call returned, one row per sequence; None is the start
            cu_seqlens: [N + 1] borders of packed documents (B == 1, and the state has N rows)
            return_state: False leaves the new state out (None in its place)
        Returns:
            y [B, T, D] in x's dtype, and the state after the last token of each row.
        """

    @abstractmethod
    def step_(self, x: Tensor, state: Any, slots: Tensor | None = None) -> tuple[Tensor, Any]:
        """One token a row, without gradients: x [B, D], its rows of `state` (`slots` [B] int64, or all in order)
        updated in place. Returns y [B, D] and the state to go on with: the same tensors, unless one had to grow.
        """

    def joined_maps(self) -> Sequence[nn.Linear]:
        """Those that `joint` applies as one, in its order."""
        return ()

    @abstractmethod
    def init_state(self, batch: int) -> Any:
        """The state before the first token, of `batch` rows, on this mixer's device."""

    @abstractmethod
    def flops_per_token(self, T: int) -> float:
        """Forward FLOPs for one token, averaged over a sequence of T tokens: 2 per multiply-add of the matrix
        products and of the recurrence in its token-by-token form; elementwise work is left out.
        """

    def state_bytes(self, T: int) -> int:
        """Bytes of state one sequence holds after T tokens."""
        return tensor_bytes(self.init_state(1))


class KeepsFloat32:
    """Mixin for modules with parameters that stay fp32 when the model is cast to bf16 or fp16.

    They are exponents and time constants: rounded to 8 bits, a decay of 0.999 per token becomes another memory.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = [(name, p.data) for name in self.float32_parameters if (p := getattr(self, name)) is not None]
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        for name, before in kept:
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                gradient, parameter.grad = parameter.grad, None
                parameter.data = before.to(device=parameter.device, dtype=torch.float32)
                parameter.grad = None if gradient is None else gradient.float()
        return module


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map would read `x`: that of autocast where it is on (it leaves fp64 alone)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def joint(x: Tensor, *groups: Sequence[nn.Linear]) -> list[Tensor]:
    """The answers to x of the maps of each group, side by side, from one matrix product for all.

    So x is read once, its gradient is one product too, and what one op reads (q, k and v of a convolution) comes as one
    tensor. The weights are laid end to end for it, unless they lie so (`glade.train.casts`); a single token a row,
    x [B, D], costs less than that, and an adapted or watched map must be called itself: these are applied one by one.
    """
    maps = [m for group in groups for m in group]
    if x.dim() < 3 or any(type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks for m in maps):
        return [torch.cat([m(x) for m in group], -1) if len(group) > 1 else group[0](x) for group in groups]
    bias = None
    if any(m.bias is not None for m in maps):
        bias = torch.cat([m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in maps])
    y = F.linear(x, together([m.weight for m in maps]), bias)
    if len(groups) == 1:
        return [y]  # the gradient of a split is a copy, even of one into one
    return list(split(y, [sum(m.out_features for m in group) for group in groups]))


def projection(dim: int, out: int, *, rank: int = 0, bias: bool = False, inner_bias: bool = False) -> nn.Module:
    """A linear map dim -> out, of full rank (0), or as the two factors `.0` and `.1`; `bias` is on the last."""
    if rank == 0:
        return nn.Linear(dim, out, bias=bias)
    return nn.Sequential(nn.Linear(dim, rank, bias=inner_bias), nn.Linear(rank, out, bias=bias))


def first_map(module: nn.Module) -> nn.Linear:
    """What a `projection` does to x first: it may be joined with others that read x."""
    first = module[0] if isinstance(module, nn.Sequential) else module
    assert isinstance(first, nn.Linear)
    return first


def second_map(module: nn.Module, z: Tensor) -> Tensor:
    """What a `projection` does to the answer `z` of its first map."""
    if not isinstance(module, nn.Sequential):
        return z
    # z is a slice of a wider tensor: only as rows does its product take the bias along
    return module[1](z.flatten(0, -2)).unflatten(0, z.shape[:-1])


def second_map_and_bias(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """`second_map` before its bias, and that, for an op that adds it, and sums its gradient, on the way through memory:
    autograd sums it in a pass of its own. None where the bias is added already, as by a map that must be called itself.
    """
    last = module[1] if isinstance(module, nn.Sequential) else module
    if last is module or type(last) is not nn.Linear or last._forward_hooks or last._forward_pre_hooks:
        return second_map(module, z), None
    return F.linear(z.flatten(0, -2), last.weight).unflatten(0, z.shape[:-1]), last.bias


def matmul_flops(module: nn.Module) -> int:
    """2 per weight of every linear map inside `module`: what one token costs in them."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def tensor_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
