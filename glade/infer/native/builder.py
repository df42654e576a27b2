"""What lowering writes into: places in the workspace, tensors of the state, instructions, and the weights they name."""

from ctypes import Structure
from typing import Any, cast

import torch
from torch import Tensor, nn

from glade.infer.lowering import FLOATS, CannotLower, ProgramBuilder, WeightsInPlace, check_dtype
from glade.infer.native.program import Program, StateSlot
from glade.infer.native.records import (
    DTYPES,
    Act,
    Instruction,
    Matmul,
    Matrix,
    Norm,
    Normalize,
    NormKind,
    Part,
    Projected,
    Rotation,
    Target,
    Vector,
    instruction,
    vector,
)
from glade.model.lm import LanguageModel
from glade.model.norm import LayerNorm, RMSNorm, RMSNormEpsOutside
from glade.model.quantized import Int8Weight

# a place begins a cache line
_ALIGNED = 16


class Builder(ProgramBuilder):
    """Collects a program of the CPU's library."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model, _ALIGNED)
        self._model = model
        self._weights = WeightsInPlace(model)
        self._instructions: list[Instruction] = []
        self._slots: list[StateSlot] = []
        self._constants: list[Tensor] = []
        self._rotations: dict[tuple[float, int], int] = {}

    def add(self, operands: Structure) -> None:
        self._instructions.append(instruction(operands))

    def rotation(self, theta: float, dims: int) -> int:
        """The place of cos and sin of `glade.ops.rope`; made once at the program's start for all layers alike."""
        key = (theta, dims)
        if key not in self._rotations:
            raise AssertionError("rotations are asked for before the first block")
        return self._rotations[key]

    def add_rotation(self, theta: float, dims: int) -> None:
        if (theta, dims) in self._rotations or not dims:
            return
        pair = torch.arange(0, dims, 2, dtype=torch.float32)
        frequencies = self.constant(theta ** (-pair / dims))
        place = self._rotations[(theta, dims)] = self.place(dims)
        self.add(Rotation(frequencies=frequencies.data, num=dims // 2, output=place))

    # weights

    def constant(self, x: Tensor) -> Vector:
        """A tensor that is the program's own."""
        self._constants.append(x)
        return vector(x)

    def weight(self, module: nn.Module, name: str) -> Tensor | None:
        """The parameter or buffer `name` of `module`, as it lies in memory; None if it is None.

        Raises:
            CannotLower: it is not on the CPU, has gaps, or is of a dtype that no instruction reads.
        """
        x: Tensor | None = getattr(module, name)
        if x is not None:
            if x.device.type != "cpu":
                raise CannotLower(f"the model is on {x.device}, and the native decode step is the CPU's")
            check_dtype(x.dtype)
        return self._weights.read(module, name)

    def vector(self, module: nn.Module, name: str) -> Vector:
        """The same of a tensor of floats, flattened."""
        return vector(self.weight(module, name))

    def matrix(self, module: nn.Module) -> Matrix:
        """The weight [rows, columns] of a linear map or of a table, and its bias."""
        if type(module) not in (nn.Linear, nn.Embedding):
            raise CannotLower(f"a {type(module).__name__} stands where a linear map was expected")
        bias = self.vector(module, "bias") if isinstance(module, nn.Linear) else Vector()
        return self.parameter_matrix(module, "weight", bias)

    def parameter_matrix(self, module: nn.Module, name: str, bias: Vector | None = None) -> Matrix:
        x = self.weight(module, name)
        assert x is not None
        if isinstance(x, Int8Weight):
            return Matrix(x.values.data_ptr(), DTYPES[torch.int8], x.scales.data_ptr(), bias or Vector(), *x.shape)
        return Matrix(x.data_ptr(), DTYPES[x.dtype], None, bias or Vector(), *x.shape)

    def norm(self, module: nn.Module | None) -> Norm:
        """A norm of `glade.model.norm`, or none where there is none or `make_norm` made the identity."""
        if module is None or isinstance(module, nn.Identity):
            return Norm()
        kinds: dict[type[nn.Module], NormKind] = {
            RMSNorm: NormKind.RMS,
            RMSNormEpsOutside: NormKind.RMS_EPS_OUTSIDE,
            LayerNorm: NormKind.LAYER,
        }
        if type(module) not in kinds:
            raise CannotLower(f"a {type(module).__name__} stands where a norm was expected")
        bias = self.vector(module, "bias") if isinstance(module, LayerNorm) else Vector()
        return Norm(kinds[type(module)], self.vector(module, "weight"), bias, cast(Any, module).eps)

    # state

    def state(
        self, layer: int, field: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> int:
        """The number of one tensor of the state, [rows, *shape]."""
        self._slots.append(StateSlot(layer, field, shape, dtypes))
        return len(self._slots) - 1

    # instructions that several parts of a model use

    def normalize(self, norm: nn.Module) -> None:
        self.add(Normalize(self.norm(norm), self.stream, self.dim))

    def matmul(
        self,
        source: int,
        columns: int,
        parts: list[tuple[Matrix, int]],
        *,
        norm: Norm | None = None,
        activation: Act = Act.NONE,
        target: Target = Target.STORE,
    ) -> None:
        """Matrices times one input, each to its own place."""
        op = Matmul(norm or Norm(), source, columns, len(parts), activation, target)
        for i, (matrix, output) in enumerate(parts):
            assert matrix.columns == columns, (matrix.columns, columns)
            op.parts[i] = Part(matrix, output)
        self.add(op)

    def program(self) -> Program:
        return Program(self._model, self._instructions, self.most, self._slots, self._weights, self._constants)


class Projections:
    """The projections of one mixer, which all read the same input and so become one product."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.parts: list[tuple[Matrix, int]] = []

    def add(self, module: nn.Module) -> int:
        """A linear map of the input; the place of its answer."""
        matrix = self.builder.matrix(module)
        place = self.builder.place(matrix.rows)
        self.parts.append((matrix, place))
        return place

    def add_factored(self, module: nn.Module, *, silu: bool = False) -> Projected:
        """A map of full rank, or the first of two factors: the second is applied where a head reads the answer."""
        if not isinstance(module, nn.Sequential):
            return Projected(self.add(module), 0, Matrix())
        first, second = module.children()
        return Projected(self.add(first), int(silu), self.builder.matrix(second))

    def emit(self, norm: nn.Module | None) -> None:
        b = self.builder
        b.matmul(b.stream, b.dim, self.parts, norm=b.norm(norm))
