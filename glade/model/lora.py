"""LoRA: small trained matrices beside the frozen ones, for the linear maps inside the blocks, gates included.

    y = W x + b + alpha / r * B A dropout(x)        A [r, in],  B [out, r], which begins as zeros

Every `nn.Linear` of the blocks has its own pair (both factors of a low-rank gate too), and so has every expert of a
mixture. Embeddings, head, norms, convolutions, biases and an RNN's recurrence stay as they are. The base weights keep
their names in `state_dict`; the adapters stand beside them, as `q_proj.adapter.A` beside `q_proj.weight`.
Source: arXiv:2106.09685.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.errors import CheckpointError, ConfigError
from glade.model.ffn import MoE
from glade.model.lm import LanguageModel

_STACKS = ("gate", "up", "down")


class Adapter(nn.Module):
    """The pair beside `weight` [..., out, in]; leading axes (experts) A and B have too.

    The rank is at most the smaller side of the weight: a gate of four heads has no use for eight.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        *stack, out, width = weight.shape
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.on = True
        rank = min(rank, out, width)
        self.A = nn.Parameter(torch.empty(*stack, rank, width, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(*stack, out, rank, dtype=weight.dtype, device=weight.device))
        nn.init.uniform_(self.A, -(width**-0.5), width**-0.5)

    def forward(self, y: Tensor, x: Tensor, expert: int | None = None) -> Tensor:
        """y [..., out] = W x, and x [..., in]; `expert`: which of the stack they belong to."""
        if not self.on:
            return y
        A, B = (self.A, self.B) if expert is None else (self.A[expert], self.B[expert])
        return y + self.scale * F.linear(F.linear(self.dropout(x), A), B)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + alpha / r * B A in W's dtype, added up in fp32 or W's own if that is finer."""
        finer = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(finer) + self.scale * (self.B.to(finer) @ self.A.to(finer))).to(weight.dtype)


class LoraLinear(nn.Linear):
    """An `nn.Linear` with an adapter."""

    adapter: Adapter

    def forward(self, input: Tensor) -> Tensor:
        return self.adapter(super().forward(input), input)


class LoraMoE(MoE):
    """A `MoE` with an adapter for each expert's three matrices."""

    gate_adapter: Adapter
    up_adapter: Adapter
    down_adapter: Adapter

    def _expert(self, e: int, x: Tensor) -> Tensor:
        gate = self.gate_adapter(F.linear(x, self.gate[e]), x, e)
        hidden = F.silu(gate) * self.up_adapter(F.linear(x, self.up[e]), x, e)
        return self.down_adapter(F.linear(hidden, self.down[e]), hidden, e)


def add_lora(model: LanguageModel, *, rank: int, alpha: float | None = None, dropout: float = 0.0) -> None:
    """Freeze `model` and give each linear map in its blocks an adapter, which as yet adds zeros.

    A is drawn from torch's global generator, in the dtype and on the device of the weight beside it.

    Args:
        rank: of every pair, at least 1.
        alpha: the pairs' product is weighted by alpha / rank; None is 2 * rank.
        dropout: probability, on the pairs' inputs while training.
    Raises:
        ConfigError: a rank below 1, or a model that has adapters, or no linear map.
    """
    if rank < 1:
        raise ConfigError(f"the rank of the adapters is {rank}; give at least 1")
    if has_lora(model):
        raise ConfigError("this model has adapters already; merge them first, with merge_lora(model)")
    targets = [m for m in model.layers.modules() if type(m) in (nn.Linear, MoE)]
    if not targets:
        raise ConfigError("this model has no linear map in its blocks, so nothing to adapt; train all of its weights")
    model.requires_grad_(False)
    weight = 2.0 * rank if alpha is None else alpha
    for module in targets:
        # the class changes, not the module: it keeps its place, its parameters and their names
        if isinstance(module, MoE):
            module.__class__ = LoraMoE
            for name in _STACKS:
                module.add_module(f"{name}_adapter", Adapter(getattr(module, name), rank, weight, dropout))
        else:
            module.__class__ = LoraLinear
            module.add_module("adapter", Adapter(module.get_parameter("weight"), rank, weight, dropout))
    model.train(model.training)


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(m, Adapter) for m in model.modules())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it was before `add_lora`: the reference of a preference loss, at no cost in memory."""
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    before = [adapter.on for adapter in adapters]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter, on in zip(adapters, before, strict=True):
            adapter.on = on


@torch.no_grad()
def merge_lora(model: LanguageModel) -> None:
    """Add the adapters to the weights and take them away: a plain, trainable model that computes the same."""
    for module, name, adapter in _adapted(model):
        weight = module.get_parameter(name)
        weight.copy_(adapter.merged(weight))
    for module in model.layers.modules():
        if isinstance(module, LoraMoE):
            for name in _STACKS:
                delattr(module, f"{name}_adapter")
            module.__class__ = MoE  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, LoraLinear):
            del module.adapter
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
    model.requires_grad_(True)


def merged(model: LanguageModel) -> LanguageModel:
    """A plain model for saving, in eval mode, with the adapters added to its weights; `model` trains on untouched.

    It shares the tensors that have no adapter with `model`: read it, do not train it.
    """
    adapters = lora_state_dict(model)
    tensors = {name: x.detach() for name, x in model.state_dict().items() if name not in adapters}
    names = {id(x): name for name, x in model.named_parameters()}
    for module, name, adapter in _adapted(model):
        weight = module.get_parameter(name)
        tensors[names[id(weight)]] = adapter.merged(weight)
    with torch.device("meta"):
        plain = LanguageModel(model.config)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


def lora_state_dict(model: LanguageModel) -> dict[str, Tensor]:
    """The adapters alone, by their names in `state_dict`; with the base's weights, all that a resumed run needs."""
    return {
        f"{path}.{name}": x.detach()
        for path, module in model.named_modules()
        if isinstance(module, Adapter)
        for name, x in module.named_parameters()
    }


@torch.no_grad()
def load_lora_state_dict(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved adapters into those of `model`.

    Raises:
        CheckpointError: names or shapes are not those of this model's adapters.
    """
    own = lora_state_dict(model)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if wrong:
        raise CheckpointError(
            f"the saved adapters are not those of this model: {', '.join(wrong[:3])} "
            f"({len(wrong)} in all) missing, unexpected or of another shape; use the rank and the model they were "
            f"trained with"
        )
    for name, x in tensors.items():
        own[name].copy_(x)


def _adapted(model: LanguageModel) -> Iterator[tuple[nn.Module, str, Adapter]]:
    """(module, name of its weight, adapter) for every adapter."""
    for module in model.layers.modules():
        if isinstance(module, LoraLinear):
            yield module, "weight", module.adapter
        elif isinstance(module, LoraMoE):
            yield from ((module, name, getattr(module, f"{name}_adapter")) for name in _STACKS)
