"""The weights as the kernels read them: maps that read one vector lie together, so that one product answers for all.

They are not copied beside the model: its parameters become views of what was laid together, so that new values count
at once, whoever writes them.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from glade.infer.lowering import CannotLower, WeightsInPlace, check_dtype
from glade.model.lm import LanguageModel
from glade.model.quantized import Int8Weight
from glade.ops.together import are_together, spanned


class Matrix(NamedTuple):
    """[N, K], in the dtype of what it is multiplied with, or int8 with the scales [N]."""

    values: Tensor
    scales: Tensor | None
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return self.values.shape[1]


class Weights(WeightsInPlace):
    """What a program reads of a model, of one dtype."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self.dtype = model.embed.weight.dtype
        check_dtype(self.dtype)

    def vector(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter as it lies in memory; None if it is None."""
        x = self.read(module, name)
        return x.detach() if type(x) is nn.Parameter else x

    def table(self, module: nn.Embedding | nn.Linear) -> Matrix:
        """The weight of one module alone."""
        bias = self.vector(module, "bias") if isinstance(module, nn.Linear) else None
        x = self.vector(module, "weight")
        assert x is not None
        if isinstance(x, Int8Weight):
            return Matrix(x.values, x.scales, bias)
        if x.dtype != self.dtype:
            raise CannotLower(f"a {type(module).__name__} is of {x.dtype}, the embedding of {self.dtype}")
        return Matrix(x, None, bias)

    def together(self, maps: Sequence[nn.Linear]) -> Matrix:
        """The weights of maps of one input, one under the other, and their biases (0 where one has none)."""
        for module in maps:
            if type(module) is not nn.Linear:
                raise CannotLower(f"a {type(module).__name__} stands where a linear map was expected")
        _lay_together([module.weight for module in maps])
        with_bias = [module for module in maps if module.bias is not None]
        biases = None
        if with_bias:
            biases = _biases(maps)
            for module in with_bias:
                self.vector(module, "bias")
        parts = [self.table(module) for module in maps]
        values = spanned([part.values for part in parts])
        scales = None
        if parts[0].scales is not None:
            scales = spanned([part.scales for part in parts if part.scales is not None])
        return Matrix(values, scales, biases)

    def parameters_together(self, modules: Sequence[nn.Module], name: str) -> Tensor:
        """The parameter `name` of each, one under the other."""
        _lay_together([getattr(module, name) for module in modules])
        return spanned([cast(Tensor, self.vector(module, name)) for module in modules])


def _lay_together(parameters: Sequence[Tensor]) -> None:
    """Makes the parameters [n_i, ...] views of one tensor, unless they lie so already."""
    if any(isinstance(x, Int8Weight) for x in parameters):
        if not all(isinstance(x, Int8Weight) for x in parameters):
            raise CannotLower("some of its matrices are int8 and some are not")
        quantized = cast("Sequence[Int8Weight]", parameters)
        for x, values, scales in zip(
            quantized, _moved([x.values for x in quantized]), _moved([x.scales for x in quantized]), strict=True
        ):
            x.values, x.scales = values, scales
        return
    for x, data in zip(parameters, _moved([x.data for x in parameters]), strict=True):
        x.data = data


def _moved(tensors: list[Tensor]) -> Sequence[Tensor]:
    if len({x.dtype for x in tensors}) > 1:
        raise CannotLower("maps of one input have weights of several dtypes")
    return tensors if are_together(tensors) else torch.cat(tensors).split([len(x) for x in tensors])


def _biases(maps: Sequence[nn.Linear]) -> Tensor:
    """One tensor of which the maps' biases are views, with zeros for those that have none."""
    at, found = 0, set()
    for module in maps:
        if module.bias is not None:
            found.add((module.bias.untyped_storage().data_ptr(), module.bias.storage_offset() - at))
        at += module.out_features
    first = next(module.bias for module in maps if module.bias is not None)
    base = first.untyped_storage()
    if len(found) == 1 and next(iter(found))[1] == 0 and base.nbytes() == at * first.element_size():
        return first.detach().as_strided((at,), (1,), 0)
    whole = first.detach().new_zeros(at)
    for module, part in zip(maps, whole.split([module.out_features for module in maps]), strict=True):
        if module.bias is not None:
            part.copy_(module.bias.detach())
            module.bias.data = part
    return whole
