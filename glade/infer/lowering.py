"""What lowering is on every device: from a `LanguageModel` to a program that reads its weights where they lie."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glade.model.block import Block
from glade.model.lm import LanguageModel
from glade.model.quantized import Int8Weight

FLOATS = (torch.float32, torch.bfloat16)
# by its class, what lowers a mixer (builder, mixer, layer, norm) or a network (builder, network, norm): it reads the
# residual stream, normed unless the norm is None, and adds to it
Mixers = Mapping[type[nn.Module], Callable[[Any, Any, int, nn.Module | None], None]]
Networks = Mapping[type[nn.Module], Callable[[Any, Any, nn.Module | None], None]]


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


class ProgramBuilder(ABC):
    """Collects one program: gives out places in its workspace, which has a row a sequence, block by block.

    alignment: a place begins at a multiple of so many numbers
    """

    def __init__(self, model: LanguageModel, alignment: int) -> None:
        self._alignment = alignment
        self._used = self.most = 0  # numbers of a row: given out now, and at most
        # the residual stream
        self.stream, self.dim = self.place(model.config.dim), model.config.dim

    def place(self, width: int) -> int:
        """Room for `width` numbers of each row: until the end of the block, or of the program outside one."""
        place = self._used
        self._used += -(-width // self._alignment) * self._alignment
        self.most = max(self.most, self._used)
        return place

    @abstractmethod
    def normalize(self, norm: nn.Module) -> None:
        """The norm of the stream, in its place."""

    def lower_blocks(self, model: LanguageModel, mixers: Mixers, networks: Networks) -> None:
        """Every block of `model`, its parts by their exact class: what a subclass changes is not known here.

        Raises:
            CannotLower: a part is of another class.
        """
        for layer, block in enumerate(model.blocks()):
            used = self._used
            self._lower_block(block, layer, mixers, networks)
            self._used = used

    def _lower_block(self, block: Block, layer: int, mixers: Mixers, networks: Networks) -> None:
        lower_mixer = mixers.get(type(block.mixer))
        if lower_mixer is None:
            raise CannotLower(f"layer {layer} mixes by a {type(block.mixer).__name__}, which no instruction knows")
        lower_mixer(self, block.mixer, layer, block.mixer_norm if block.pre else None)
        if not block.pre:
            self.normalize(block.mixer_norm)
        if block.ffn is None or block.ffn_norm is None:
            return
        lower_network = networks.get(type(block.ffn))
        if lower_network is None:
            raise CannotLower(f"layer {layer} has a {type(block.ffn).__name__} network, which no instruction knows")
        lower_network(self, block.ffn, block.ffn_norm if block.pre else None)
        if not block.pre:
            self.normalize(block.ffn_norm)
