"""A lowered model: its instructions, and what they work on. Nothing it enqueues asks the device for a value."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from glade.infer.captured.draw import draw_, suits
from glade.infer.captured.instructions import Instruction, Run, overlapping
from glade.infer.captured.weights import Weights
from glade.infer.limits import refuse_ids, refuse_position, refuse_slots
from glade.infer.rows import grow_, growing_layers
from glade.infer.sampler import Rules
from glade.model.lm import LanguageModel
from glade.model.mixers.linear import LinearState
from glade.model.state import State, check_state


class Binding(NamedTuple):
    """A state as the kernels read it; while it is the same object, so are all addresses."""

    layers: tuple[Any, ...]
    position: Tensor
    pasts: tuple[Tensor | None, ...]


class Program:
    """Instructions for one token a row of a model. Not for two threads at once."""

    path = "captured"

    def __init__(
        self,
        model: LanguageModel,
        instructions: Sequence[Instruction],
        places: int,
        weights: Weights,
        convolved: dict[int, int],
    ) -> None:
        self._model, self._instructions, self._places = model, instructions, places
        self._weights, self._convolved = weights, convolved
        self._dtype, self._device = weights.dtype, model.embed.weight.device
        self.overlap = overlapping(self._device)
        self._vocab_size = cast(int, model.config.vocab_size)
        self._like = model.init_state(0)
        self._growing = [layer for layer, grows in enumerate(growing_layers(model)) if grows]
        self._binding: Binding | None = None

    def is_current(self) -> bool:
        """Whether the model's weights are where they were when it was lowered. Their values may have changed."""
        return self._weights.are_current()

    def run(self, ids: Tensor, state: State, slots: Tensor | None) -> Tensor:
        """One token a row: `state` moves on in place. Logits [B, vocab_size] in fp32.

        Raises:
            ValueError: an id, slot or position out of range, or a state of another model; nothing has changed then.
        """
        if slots is None:
            slots = torch.arange(len(ids), device=ids.device)
        self._check(ids, state, slots)
        grow_(state, self._growing)
        self.bind(state)
        return self.enqueue(ids, state, slots, torch.ones_like(slots))

    def drawing(self, rules: Rules, most_tops: int) -> Callable[..., Tensor] | None:
        """What draws by these rules in few kernels (`glade.infer.captured.draw.draw_`); None: nothing that is here."""
        return draw_ if suits(rules, most_tops) else None

    def bind(self, state: State) -> Binding:
        """The addresses of a state, found anew when its tensors are others than last time. It may wait for the device.

        Raises:
            CheckpointError: a state of another model.
            ValueError: the layers have seen other numbers of tokens than the state says.
        """
        bound = self._binding
        if bound is not None and bound.layers is state.layers and bound.position is state.position:
            return bound
        check_state(self._like, state, "state")
        for layer in state.layers:
            # one count serves for all layers where they read, so they must agree
            if "length" in layer._fields and not torch.equal(layer.length, state.position):
                raise ValueError("the layers of this state have seen other numbers of tokens than state.position says")
        state.layers = tuple(type(layer)(*map(_without_gaps, layer._fields, layer)) for layer in state.layers)
        layers, pasts = [], []
        for i, layer in enumerate(state.layers):
            past = _joined_past(layer) if i in self._convolved else None
            layers.append(layer if past is None else _with_past(layer, past))
            pasts.append(past)
        state.layers = tuple(layers)
        self._binding = Binding(state.layers, state.position, tuple(pasts))
        return self._binding

    @torch.no_grad()
    def enqueue(self, ids: Tensor, state: State, slots: Tensor, live: Tensor) -> Tensor:
        """`run` for a bound state and ids, slots and lengths that are known to be right: the device is only told.

        live: [B] int64, 1, or 0 for a row where nobody sits: its position stays 0
        """
        bound = self._binding
        assert bound is not None and bound.layers is state.layers and bound.position is state.position
        B = len(ids)
        workspace = torch.empty(B, self._places, dtype=self._dtype, device=self._device)
        logits = torch.empty(B, self._vocab_size, dtype=torch.float32, device=self._device)
        if not B:
            return logits
        run = Run(ids, slots, live, state, bound.pasts, workspace, logits, self.overlap)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            for instruction in self._instructions:
                instruction.launch(run)
        return logits

    def _check(self, ids: Tensor, state: State, slots: Tensor) -> None:
        if not len(ids):
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            refuse_ids(ids, self._vocab_size)
        given = slots.tolist()
        if len(set(given)) < len(given) or min(given) < 0 or max(given) >= len(state):
            refuse_slots(given, len(state))
        last, positions = int(state.position[slots].max()), self._model.config.learned_positions
        if positions and last >= positions:
            refuse_position(last, positions)


def _without_gaps(name: str, x: Tensor) -> Tensor:
    # the convolutions' pasts are views of one tensor, and joined below if they are not
    return x if name.startswith("conv_") else x.contiguous()


def _joined_past(layer: LinearState) -> Tensor:
    """What the three convolutions remember as one tensor [rows, channels, W - 1]; copied if it is not one."""
    parts = [layer.conv_q, layer.conv_k, layer.conv_v]
    channels, taps = sum(x.shape[1] for x in parts), parts[0].shape[2]
    first, at = parts[0], 0
    together = True
    for x in parts:
        there = first.data_ptr() + at * taps * x.element_size()
        strides = (channels * taps, taps, 1)
        together = together and x.stride() == strides and x.data_ptr() == there
        at += x.shape[1]
    if together and len({x.untyped_storage().data_ptr() for x in parts}) == 1:
        return first.as_strided((len(first), channels, taps), first.stride())
    return torch.cat(parts, 1)


def _with_past(layer: LinearState, past: Tensor) -> LinearState:
    q, k, v = past.split([x.shape[1] for x in (layer.conv_q, layer.conv_k, layer.conv_v)], 1)
    return layer._replace(conv_q=q, conv_k=k, conv_v=v)
