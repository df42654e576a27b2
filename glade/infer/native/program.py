"""A lowered model: its instructions, and the one call that runs them for a token a row.

The weights are read where they are, so new values count at once; that they are still there is asked before each run
(`Program.is_current`). The state's tensors are updated in place.
"""

import struct
from ctypes import addressof, c_int64
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glade.infer.limits import refuse_ids, refuse_position, refuse_slots
from glade.infer.lowering import WeightsInPlace
from glade.infer.native.records import DTYPES, Instruction, Run, StateTensor, Status
from glade.infer.rows import grow_, growing_layers
from glade.model.lm import LanguageModel
from glade.model.state import State
from glade.ops import native

_HUGE_PAGE_BYTES = 2**21


class StateSlot(NamedTuple):
    """One tensor of the state that instructions name by its place in the list."""

    layer: int
    field: str
    shape: tuple[int | None, ...]  # without rows; None: any
    dtypes: tuple[torch.dtype, ...]


class _Bound(NamedTuple):
    """A state as the library reads it; holds the tensors, so that the addresses stay good."""

    layers: tuple[Any, ...]
    position: Tensor
    position_address: int
    rows: int
    table: Any
    lengths: Any


class Program:
    """Instructions for one token of a model, and the workspace they run in. Not for two threads at once."""

    path = "native"

    def __init__(
        self,
        model: LanguageModel,
        instructions: list[Instruction],
        row_floats: int,
        slots: list[StateSlot],
        weights: WeightsInPlace,
        constants: list[Tensor],
    ) -> None:
        self._instructions = (Instruction * len(instructions))(*instructions)
        self._slots = slots
        self._weights = weights
        self._constants = constants  # kept because their addresses are in the instructions
        self._workspace, self._workspace_rows = torch.empty(0), 0
        self._bound: _Bound | None = None
        _use_huge_pages(weights.hold())
        self._num_layers = len(model.layers)
        self._growing = [layer for layer, grows in enumerate(growing_layers(model)) if grows]
        self._run = Run(
            num_instructions=len(instructions),
            instructions=addressof(self._instructions),
            row_floats=row_floats,
            vocab_size=model.config.vocab_size,
            most_positions=model.config.learned_positions,
        )

    def is_current(self) -> bool:
        """Whether the model's weights are where they were when it was lowered. Their values may have changed."""
        return self._weights.are_current()

    def hold(self) -> list[Tensor]:
        """What keeps the memory of the weights from being freed, whatever becomes of the model's own tensors."""
        return self._weights.hold()

    def run(self, ids: Tensor, state: State, slots: Tensor | None) -> Tensor:
        """One token a row: `state` moves on in place. Logits [B, vocab_size] in fp32.

        Raises:
            ValueError: an id, slot or position out of range, or a state of another model; nothing has changed then.
        """
        grow_(state, self._growing)
        bound = self._bind(state)
        # every call of torch's costs microseconds here, since the weights have just swept the caches
        run, rows = self._run, ids.shape[0]
        if self._workspace_rows < rows:
            self._workspace, self._workspace_rows = torch.empty(rows * run.row_floats), rows
            run.workspace = self._workspace.data_ptr()
        ids = _whole_numbers(ids)
        slots = None if slots is None else _whole_numbers(slots)
        logits = torch.empty(rows, run.vocab_size)
        run.num_rows, run.num_threads, run.num_state_rows = rows, torch.get_num_threads(), bound.rows
        run.ids, run.slots = ids.data_ptr(), None if slots is None else slots.data_ptr()
        run.states, run.positions, run.logits = addressof(bound.table), bound.position_address, logits.data_ptr()
        run.lengths, run.num_lengths = addressof(bound.lengths), len(bound.lengths)
        assert native.LIBRARY is not None
        status = native.LIBRARY.call("glade_decode", bytes(run))
        if status:
            self._refuse(Status(status), ids, slots, state)
        return logits

    def _bind(self, state: State) -> _Bound:
        """The addresses of a state, made anew when its tensors are others than last time."""
        bound = self._bound
        if bound is not None and bound.layers is state.layers and bound.position is state.position:
            return bound
        if len(state.layers) != self._num_layers:
            raise ValueError(
                f"state has {len(state.layers)} layers, the model {self._num_layers}: it is of another model"
            )
        state.layers = tuple(type(layer)(*(x.contiguous() for x in layer)) for layer in state.layers)
        table = (StateTensor * len(self._slots))()
        for i, slot in enumerate(self._slots):
            x = _checked(state, slot)
            table[i] = StateTensor(x.data_ptr(), DTYPES[x.dtype], x[0].numel() if len(x) else 0)
        counts = [state.position, *(layer.length for layer in state.layers if hasattr(layer, "length"))]
        for count in counts:
            # one count serves for all layers where they read, so they must agree
            if count.dtype != torch.int64 or not torch.equal(count, state.position):
                raise ValueError("the layers of this state have seen other numbers of tokens than state.position says")
        lengths = (c_int64 * len(counts))(*(count.data_ptr() for count in counts))
        self._bound = _Bound(state.layers, state.position, state.position.data_ptr(), len(state), table, lengths)
        return self._bound

    def _refuse(self, status: Status, ids: Tensor, slots: Tensor | None, state: State) -> None:
        if status is Status.BAD_ID:
            refuse_ids(ids, self._run.vocab_size)
        if status is Status.BAD_SLOT:
            refuse_slots(None if slots is None else slots.tolist(), len(state))
        if status is Status.BAD_POSITION:
            refuse_position(int(state.position.max()), self._run.most_positions)
        raise AssertionError(status)


def _whole_numbers(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int64 and x.is_contiguous() else x.to(torch.int64).contiguous()


def _use_huge_pages(weights: list[Tensor]) -> None:
    """Asks for large pages under the weights, neighbours together."""
    assert native.LIBRARY is not None
    ends: list[list[int]] = []
    for first, end in sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in weights):
        if ends and first - ends[-1][1] < _HUGE_PAGE_BYTES:
            ends[-1][1] = max(end, ends[-1][1])
        else:
            ends.append([first, end])
    for first, end in ends:
        if end - first >= _HUGE_PAGE_BYTES:
            native.LIBRARY.call("glade_use_huge_pages", struct.pack("=2q", first, end))


def _checked(state: State, slot: StateSlot) -> Tensor:
    """The tensor of the state that `slot` means; ValueError if it is another model's."""
    x = getattr(state.layers[slot.layer], slot.field, None)
    name = f"state.layers[{slot.layer}].{slot.field}"
    if x is None:
        raise ValueError(f"there is no {name}: this state is of another model")
    fits = all(wanted is None or n == wanted for n, wanted in zip(x.shape[1:], slot.shape, strict=False))
    if x.dim() != len(slot.shape) + 1 or len(x) != len(state) or not fits:
        raise ValueError(f"{name} has shape {list(x.shape)}; this model makes {[len(state), *slot.shape]}")
    if x.dtype not in slot.dtypes or x.device.type != "cpu":
        allowed = " or ".join(str(dtype) for dtype in slot.dtypes)
        raise ValueError(f"{name} is {x.dtype} on {x.device}; the native decode step reads {allowed} on the CPU")
    return x
