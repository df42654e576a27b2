"""From an engine's thread to an event loop, which is woken once for whatever comes before it looks: a step's tokens.

Waking it for each token would cost an engine of 64 sequences more than all else that it does for them.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

_handovers: WeakKeyDictionary[asyncio.AbstractEventLoop, "Handover"] = WeakKeyDictionary()
_adding = threading.Lock()


class Handover:
    """Calls in a loop, in the order in which they were asked for. Any thread may ask."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def call(self, function: Callable[[], None]) -> None:
        """`function()` in the loop, or never if that is closed: nobody is left there to hear of it."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            return
        self._calls.append(function)
        # set back before the calls are taken: who finds it set has asked in time
        if not self._woken:
            self._woken = True
            loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._woken = False
        while self._calls:
            self._calls.popleft()()


def handover_to(loop: asyncio.AbstractEventLoop) -> Handover:
    """The one of this loop."""
    with _adding:
        return _handovers.setdefault(loop, Handover(loop))
