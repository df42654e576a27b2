"""The decode step: one token for each row of a batch, by the fastest path there is for the model. Draws nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from glade.errors import BackendError
from glade.infer import native
from glade.infer.lowering import CannotLower
from glade.model.lm import LanguageModel
from glade.model.quantized import is_quantized
from glade.model.state import State

if TYPE_CHECKING:
    from glade.infer.captured.program import Program


class Step(Protocol):
    """`LanguageModel.step_`, whatever runs it."""

    @property
    def path(self) -> str:
        """What runs the next token: `native`, the CPU's program; `captured`, the GPU's; or `torch`, the model's own
        `step_`."""
        ...

    @property
    def reason(self) -> str:
        """Why it is the model's own; empty if it is not."""
        ...

    @property
    def captured(self) -> "Program | None":
        """The GPU's program, for whoever records it as a graph; None on another path."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Inside, the caller promises that the model's weights stay where they are (their values may change), and the
        native program looks for them once, not before every token. It keeps their memory until the end, so that weights
        moved all the same are read as they were."""
        ...

    def __call__(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        """Decode: ids [B] int64, `state` updated in place. Logits [B, vocab_size].

        slots: [B] int64, the distinct rows of `state` that ids belong to; None is all, in order

        Raises:
            ValueError: an id outside the vocabulary, a row beyond the learned positions, or shapes that do not fit.
        """
        ...


def decode_step(model: LanguageModel) -> Step:
    """The decode step of `model` as it is whenever it is called: weights may change, move or be cast between calls.

    On the CPU a native program runs the whole model in one call. Activations are fp32 whatever the weights are; only a
    batch of several rows rounds them to bf16 for products with bf16 weights, where the processor multiplies pairs of
    them. A row's result is the same to the bit with any number of threads and in any batch (of bf16 weights: in any
    of several rows).

    On a CUDA device with Triton a program of few kernels a layer runs it, which `glade.infer.slots` records as a graph;
    the model's maps of one input are laid together in memory for it. Activations are of the weights' dtype, sums fp32.

    What cannot run so (`reason` says why: a mixture of experts, fp16 and fp64 weights, active dropout, another device)
    goes through `LanguageModel.step_`.

    Weights of 8 bits (`glade.model.quantized`) are read as such by the programs alone: on a CPU that cannot run its
    program they are refused, elsewhere each product widens them first.

    Raises:
        BackendError: 8-bit weights on a CPU without the native program; also from a call, if the model became that.

    The step keeps a workspace: one for each thread that decodes. It holds the last state it has seen.
    """
    return _DecodeStep(model)


class _DecodeStep:
    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._program: native.Program | Program | None = None
        self._reason = ""
        self._kept: list[Tensor] | None = None
        self._choose()

    @property
    def path(self) -> str:
        self._choose()
        return "torch" if self._program is None else self._program.path

    @property
    def reason(self) -> str:
        self._choose()
        return self._reason

    @property
    def captured(self) -> "Program | None":
        self._choose()
        return None if self._program is None or isinstance(self._program, native.Program) else self._program

    @contextmanager
    def held(self) -> Iterator[None]:
        self._choose()
        if isinstance(self._program, native.Program):
            self._kept = self._program.hold()
        try:
            yield
        finally:
            self._kept = None

    def __call__(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        self._choose()
        if self._program is None:
            return self._model.step_(ids, state, slots)
        if ids.dim() != 1 or len(ids) != (len(state) if slots is None else len(slots)):
            rows = f"the state's {len(state)} rows" if slots is None else f"{len(slots)} slots"
            raise ValueError(f"ids has shape {list(ids.shape)} with {rows}; give one token a row, [B]")
        return self._program.run(ids, state, slots)

    def _choose(self) -> None:
        """Lowers the model anew where its weights are no longer what the program was made of."""
        where_it_was = self._program is not None and (self._kept is not None or self._program.is_current())
        if where_it_was and not self._drops():
            return
        self._kept = None
        self._program, self._reason = None, ""
        if type(self._model).step_ is not LanguageModel.step_:
            self._reason = f"{type(self._model).__name__} has a decode step of its own"
            return
        try:
            if self._drops():
                raise CannotLower("the model is in training mode and has dropout; call eval()")
            self._program = _lower(self._model)
        except CannotLower as reason:
            self._reason = str(reason)
        if self._program is None and is_quantized(self._model) and self._model.embed.weight.device.type == "cpu":
            raise BackendError(f"int8 weights decode on a CPU by the native program alone, and {self._reason}")

    def _drops(self) -> bool:
        config = self._model.config
        return self._model.training and bool(config.dropout or config.residual_dropout)


def _lower(model: LanguageModel) -> "native.Program | Program":
    if model.embed.weight.device.type != "cuda":
        return native.lower(model)
    if find_spec("triton") is None:
        raise CannotLower("Triton is not installed beside torch, and the GPU's decode step is written in it")
    from glade.infer.captured.lower import lower

    return lower(model)
