"""CUDA graphs of a function that is called again and again: recorded once for each kind of call, then replayed."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Sequence[Tensor]], Tensor]
# recording begins by waiting for the whole device, which another thread's recording would not survive
_recording = threading.Lock()


class Graphs:
    """Runs functions of tensors. The first call of a kind runs as it is, which compiles its kernels; the second is
    recorded, and from then on the record is replayed.

    What a function reads besides its tensors must stay where it is (`clear` when it moves). It may not ask the device
    for a value. Its answer is overwritten by the next call. On the CPU nothing is recorded: the function is called.

    most: recordings that are kept, the last used ones
    """

    def __init__(self, device: torch.device, most: int = 64) -> None:
        self._device, self._most = device, most
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Forgets all recordings: something moved."""
        self._recorded.clear()
        self._seen.clear()

    def run(self, kind: Hashable, tensors: Sequence[Tensor], function: Function) -> Tensor:
        """function(tensors). Calls of one `kind` have tensors of the same shapes and dtypes, and do the same.

        The same sequence object as last time means that its values are the same, too.
        """
        if kind not in self._seen:
            self._seen.add(kind)
            return function(tensors)
        recording = self._recorded.get(kind)
        if recording is None:
            recording = self._recorded[kind] = _Recording(tensors, function, self._device, self._pool)
            if len(self._recorded) > self._most:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(kind)
        return recording.replay(tensors)


class _Recording:
    def __init__(self, tensors: Sequence[Tensor], function: Function, device: torch.device, pool: Any) -> None:
        self._inputs = [x.clone() for x in tensors]
        self._latest = tensors
        self._graph: torch.cuda.CUDAGraph | None = None
        self._function = function
        if device.type != "cuda":
            return
        self._graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.device(device):
            stream = torch.cuda.Stream()
            # other threads may go on using the device meanwhile
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._answer = function(self._inputs)

    def replay(self, tensors: Sequence[Tensor]) -> Tensor:
        if tensors is not self._latest:
            for there, here in zip(self._inputs, tensors, strict=True):
                there.copy_(here, non_blocking=True)
            self._latest = tensors
        if self._graph is None:
            return self._function(self._inputs)
        self._graph.replay()
        return self._answer
