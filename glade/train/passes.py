"""How an objective's forward passes run on the model's device: `Direct`, one kernel after another, or `Recorded`.

A pass starts thousands of kernels, and in a model of a few hundred million parameters Python takes longer to start
them than a GPU to run them. `Recorded` runs the first passes of each size as they are, records one and its backward as
two CUDA graphs, and from then on replays these: the same kernels on the same numbers, started at once.

Sizes repeat because rows are filled up: `Packed.padded` adds tokens without a target, in a document of their own, and
documents without a token, so that there are few different sizes. What the values of the borders decide (how much room
the longest document takes) is rounded up, too, and told to the ops (`glade.ops.packing.declare_longest`).
"""

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from glade.model.lm import LanguageModel
from glade.model.mixers.attention import Attention
from glade.model.mixers.linear import Linear
from glade.ops.attention import flash
from glade.ops.many import copy_all
from glade.ops.packing import asked_once_a_recording, declare_longest, rounded_up
from glade.train.casts import cast_weights, reading

Function = Callable[..., tuple[Tensor, Tensor | None]]
"""(model, *tensors of a `Packed`) -> what is to be differentiated, and the load-balancing loss of experts or None."""
add_all = torch._foreach_add_  # many tensors by few kernels  # pyright: ignore[reportPrivateImportUsage]
MOST_SIZES = 64  # that are kept, the last used ones
RECORDED = 3  # the pass of a size that is recorded: to record takes as long as some passes do


class Packed(Protocol):
    """A NamedTuple of tensors on the CPU, or None in the place of one."""

    def padded(self) -> Self:
        """The same, filled up to one of few sizes."""
        ...

    def all_borders(self) -> Sequence[Tensor]:
        """Those of its tensors that are `cu_seqlens`."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Direct:
    """Starts one kernel after another."""

    def __init__(self, model: Callable[..., Any], device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, function: Function, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """function(model, *packed), on the device."""
        return function(self.model, *(None if x is None else sent(x, self.device) for x in packed))


class Recorded:
    """Replays CUDA graphs of the passes that are to be differentiated; others run as they are.

    A pass's backward has to come before the next pass. It leaves the gradients in `grad` of the parameters, without a
    call of their hooks. The parameters may change in place, but not move.

    Recordings keep the memory that a pass takes, all of them the same, and a pass of a new size takes its own beside
    it. Where that might not be there, nothing is recorded any more, with a warning.
    """

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        assert device.type == "cuda"
        self.model, self.device = model, device
        self._sizes: OrderedDict[Hashable, int | _Graphs] = OrderedDict()  # how often one was seen, or its recording
        self._pool = torch.cuda.graph_pool_handle()
        # one for all recordings: torch's products keep a workspace for each stream they have been on
        self._stream = torch.cuda.Stream(device)
        self._gradients: dict[nn.Parameter, Tensor] = {}  # where every recording writes them
        self._pool_bytes = 0
        self._most_tokens = 1  # of a recorded pass
        self._records = True

    def __len__(self) -> int:
        """Sizes that have been recorded."""
        return sum(isinstance(size, _Graphs) for size in self._sizes.values())

    def __call__(self, function: Function, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """function(model, *packed.padded()), on the device."""
        packed = packed.padded()
        longest = {id(x): _longest(x) for x in packed.all_borders()}
        if not torch.is_grad_enabled() or not self._records:
            return self._run(function, packed, longest)
        size = self._size(function, packed, longest)
        known = self._sizes.pop(size, 0)
        if isinstance(known, int):
            if self._pool_bytes and not self._has_room(packed):
                self._give_up()
                return self._run(function, packed, longest)
            known = self._record(function, packed, longest) if known + 1 == RECORDED else known + 1
        self._sizes[size] = known  # the last used one is the last
        if len(self._sizes) > MOST_SIZES:
            self._sizes.popitem(last=False)
        return self._run(function, packed, longest) if isinstance(known, int) else (known.run(packed), None)

    def _run(self, function: Function, packed: Packed, longest: dict[int, int]) -> tuple[Tensor, Tensor | None]:
        return function(reading(self.model, self._cast()), *_placed(packed, longest, lambda x: sent(x, self.device)))

    def _cast(self) -> dict[str, Tensor]:
        """The weights that a pass multiplies in another dtype than theirs."""
        if not torch.is_autocast_enabled("cuda") or not torch.is_grad_enabled():
            return {}
        return cast_weights(self.model, torch.get_autocast_dtype("cuda"))

    def _size(self, function: Function, packed: Packed, longest: dict[int, int]) -> Hashable:
        """What two passes share where the second can be a replay of the first."""
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in packed)
        trained = tuple(p.requires_grad for p in self.model.parameters())
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return function, shapes, tuple(longest.values()), trained, autocast, self.model.training

    def _record(self, function: Function, packed: Packed, longest: dict[int, int]) -> "_Graphs":
        inputs = _placed(packed, longest, lambda x: sent(x, self.device).clone())
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for p in parameters.values():
            if p not in self._gradients:
                self._gradients[p] = torch.empty_like(p)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        with torch.cuda.device(self.device), asked_once_a_recording():
            # what autocast has cast before would be read where it lies, and not be cast again in a replay
            torch.clear_autocast_cache()
            with self._recording(forward):
                cast = self._cast()
                values, load_balance = function(reading(self.model, cast), *inputs)
            torch.clear_autocast_cache()
            assert load_balance is None, "experts are chosen by values (`why_not_recorded`)"
            d_values = torch.empty_like(values)
            with torch.autocast("cuda", enabled=False), self._recording(backward):
                # of what was cast, the gradient is cast back on its way to where it is kept
                read = [cast.get(name, p) for name, p in parameters.items()]
                found = torch.autograd.grad(values, read, d_values, allow_unused=True)
                reached = {p: d for p, d in zip(parameters.values(), found, strict=True) if d is not None}
                copy_all([self._gradients[p] for p in reached], list(reached.values()))
        self._pool_bytes += torch.cuda.memory_reserved(self.device) - before
        self._most_tokens = max(self._most_tokens, _num_tokens(packed))
        gradients = {p: self._gradients[p] for p in reached}
        return _Graphs(inputs, forward, values.detach(), backward, d_values, gradients)

    def _has_room(self, packed: Packed) -> bool:
        """Whether a pass may take the memory that recorded ones do, beside theirs."""
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) - self._pool_bytes
        return free + unused > 1.1 * self._pool_bytes * _num_tokens(packed) / self._most_tokens

    def _give_up(self) -> None:
        warnings.warn(
            "passes of several sizes do not fit the GPU beside those recorded as CUDA graphs, so none are recorded "
            "any more; split a step (train.accumulate), or set train.cuda_graphs=off to be without this message",
            RuntimeWarning,
            stacklevel=2,
        )
        self._records = False
        self._sizes.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _recording(self, graph: torch.cuda.CUDAGraph) -> Any:
        # other threads may go on using the device meanwhile
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")


class _Graphs:
    """A recorded pass: graphs, what they read and what they write."""

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        forward: torch.cuda.CUDAGraph,
        values: Tensor,
        backward: torch.cuda.CUDAGraph,
        d_values: Tensor,
        gradients: dict[nn.Parameter, Tensor],
    ) -> None:
        self.inputs, self.forward, self.values = inputs, forward, values
        self.backward, self.d_values, self.gradients = backward, d_values, gradients
        self.turn = 0
        self._differentiated = torch.empty(0, device=values.device, requires_grad=True)

    def run(self, packed: Packed) -> Tensor:
        for there, here in zip(self.inputs, packed, strict=True):
            if there is not None:
                there.copy_(here.pin_memory(), non_blocking=True)
        return _Replay.apply(self._differentiated, self)

    def add_gradients(self) -> None:
        """To what earlier passes of the step have left in `grad`."""
        before = {p: p.grad for p in self.gradients if p.grad is not None}
        for p, d in before.items():
            if d is self.gradients[p]:
                before[p] = d.clone()
        self.backward.replay()
        for p, d in self.gradients.items():
            p.grad = d
        if before:
            add_all([self.gradients[p] for p in before], list(before.values()))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, differentiated: Tensor, graphs: _Graphs) -> Tensor:
        graphs.forward.replay()
        graphs.turn += 1
        ctx.graphs, ctx.turn = graphs, graphs.turn
        return graphs.values.clone()

    @staticmethod
    def backward(ctx, d_values: Tensor):
        graphs: _Graphs = ctx.graphs
        assert ctx.turn == graphs.turn, "another pass has overwritten what this backward reads"
        graphs.d_values.copy_(d_values)
        graphs.add_gradients()
        return None, None


def _placed(packed: Packed, longest: dict[int, int], place: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """The tensors on the device, the ops told of the borders among them."""
    placed = []
    for x in packed:
        there = None if x is None else place(x)
        if id(x) in longest and there is not None:
            declare_longest(there, longest[id(x)])
        placed.append(there)
    return placed


def _num_tokens(packed: Packed) -> int:
    return max(1, sum(x.numel() for x in packed if x is not None))


def _longest(borders: Tensor) -> int:
    """The tokens of the longest document, rounded up to a power of two."""
    return rounded_up(int(borders.diff().max()), 1) if len(borders) > 1 else 0


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device of the model; to a GPU from pinned memory, which nothing waits for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


Passes = Direct | Recorded


def why_not_recorded(model: LanguageModel, bf16: bool) -> str | None:
    """Why passes of the model, its products in bf16 or not, cannot be recorded on a GPU; None if they can."""
    config = model.config
    if config.ffn == "moe":
        return "which experts a token goes to is known on the device alone"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout draws other numbers each time"
    for block in model.blocks():
        mixer = block.mixer
        if isinstance(mixer, Attention):
            if not bf16 or not flash.takes(mixer.options.head_dim, mixer.options.head_dim_v):
                return "softmax attention without torch's flash kernel asks the GPU where documents end"
        elif not isinstance(mixer, Linear):
            return f"the mixer {type(mixer).__name__} is stepped through its tokens from the CPU"
    return None
