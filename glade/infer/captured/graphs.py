"""CUDA graphs of a function that is called again and again: recorded once for each kind of call, then replayed."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from glade.ops.many import copy_all

Function = Callable[[Sequence[Tensor]], Any]
"""Of tensors; answers a tensor, or several."""
# recording begins by waiting for the whole device, which another thread's recording would not survive
_recording = threading.Lock()


class Graphs:
    """Runs functions of tensors. The first call of a kind runs as it is, which compiles its kernels; the second is
    recorded, and from then on the record is replayed.

    What a function reads besides its tensors must stay where it is (`clear` when it moves). It may not ask the device
    for a value. Its answer is overwritten by the next call. On the CPU nothing is recorded: the function is called.

    most: kinds that are kept, the last used ones
    """

    def __init__(self, device: torch.device, most: int = 64) -> None:
        self._most = most
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # one for all recordings: torch's products keep a workspace for each stream they have been on
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        """Kinds that have been recorded (on the CPU: would have been)."""
        return sum(kind.recorded for kind in self._kinds.values())

    def clear(self) -> None:
        """Forgets all recordings: something moved."""
        self._kinds.clear()

    def run(self, kind: Hashable, tensors: Sequence[Tensor], function: Function) -> Any:
        """function(tensors). Calls of one `kind` have tensors of the same shapes and dtypes, and do the same.

        The same sequence object as last time means that its values are the same, too.
        """
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = _Kind(tensors)
            if len(self._kinds) > self._most:
                self._kinds.popitem(last=False)
            return function(known.inputs)
        self._kinds.move_to_end(kind)
        known.take(tensors)
        if not known.recorded:
            known.record(function, self._stream, self._pool)
        return known.answer(function)


class _Kind:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # the first call reads these too: kernels are compiled for the alignment of their arguments
        self.inputs = [x.clone() for x in tensors]
        self._latest = tensors
        self.recorded = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._answer: Any = None

    def take(self, tensors: Sequence[Tensor]) -> None:
        if tensors is not self._latest:
            copy_all(self.inputs, tensors)
            self._latest = tensors

    def record(self, function: Function, stream: torch.cuda.Stream | None, pool: Any) -> None:
        self.recorded = True
        if stream is None:
            return
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the device meanwhile
        recorded = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with _recording, torch.cuda.device(stream.device), recorded:
            self._answer = function(self.inputs)
        self._graph = graph

    def answer(self, function: Function) -> Any:
        if self._graph is None or self._answer is None:
            return function(self.inputs)
        self._graph.replay()
        return self._answer
