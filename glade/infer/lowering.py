"""What lowering is on every device: from a `LanguageModel` to a program that reads its weights where they lie."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glade.model.lm import LanguageModel
from glade.model.quantized import Int8Weight

FLOATS = (torch.float32, torch.bfloat16)


class CannotLower(Exception):
    """Why a model has no decode program."""


def check_dtype(dtype: torch.dtype) -> None:
    """CannotLower unless it is one that programs read, whether itself or rounded to 8 bits."""
    if dtype not in FLOATS:
        name = str(dtype).removeprefix("torch.")
        raise CannotLower(f"its weights are {name}; float32, bfloat16 and int8 are read")


class _Held(NamedTuple):
    """A tensor whose address is in the program, and where the model keeps it."""

    owner: dict[str, Any]
    name: str
    address: int
    dtype: torch.dtype


class WeightsInPlace:
    """The weights that a program reads where the model has them, so that new values count at once."""

    def __init__(self, model: LanguageModel) -> None:
        self._held: list[_Held] = []
        self._children = [(m._modules, tuple(m._modules.values())) for m in model.modules() if m._modules]

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """The parameter or buffer `name` of `module`, whose address goes into the program; None if it is None.

        Raises:
            CannotLower: it has gaps in memory.
        """
        if getattr(module, name) is None:
            return None
        owner = module._parameters if name in module._parameters else module._buffers
        x = cast(Tensor, owner[name])
        held = _memory(x)
        if not held.is_contiguous():
            raise CannotLower(f"{name} of a {type(module).__name__} is not contiguous in memory")
        self._held.append(_Held(cast("dict[str, Any]", owner), name, held.data_ptr(), held.dtype))
        return x

    def are_current(self) -> bool:
        """Whether all of them, and the modules, are where they were. Values may have changed."""
        for owner, name, address, dtype in self._held:
            x = owner.get(name)
            if x is None:
                return False
            held = _memory(x)
            if held.data_ptr() != address or held.dtype is not dtype:
                return False
        return all(tuple(modules.values()) == children for modules, children in self._children)

    def hold(self) -> list[Tensor]:
        """What keeps the memory of the weights from being freed, whatever becomes of the model's own tensors."""
        return [_memory(owner[name]).detach() for owner, name, *_ in self._held]


def _memory(weight: Tensor) -> Tensor:
    """The tensor that holds a weight's numbers."""
    return weight.values if isinstance(weight, Int8Weight) else weight
