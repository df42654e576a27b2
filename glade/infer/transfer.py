"""What crosses between the host and the device without either waiting for the other: settings there, tokens back."""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Token(NamedTuple):
    """One drawn token: `logprob` is its log-probability (nats) under the model, before any sampling rule.

    It is nan where the model's logits are not finite; the token then has no meaning.
    """

    row: int  # index of its prompt, or its slot
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely ids with their log-probabilities, best first


class Report:
    """What a step has drawn, on its way to the host behind the step itself.

    Args:
        table: [B, 2 + 2 n] int64: the id and the n most likely ids, then the bits of their log-probabilities in fp32.
            The next step may overwrite it
        taken: the slot of each row that is somebody's, in order
        rows:  for each of `taken`, its row of the table
        tops:  for each of `taken`, how many most likely tokens it reports
    """

    def __init__(self, table: Tensor, taken: Sequence[int], rows: slice | list[int], tops: Sequence[int]) -> None:
        # a GPU's goes to pinned memory, so that the host may do something else meanwhile
        self._table = table.to("cpu", non_blocking=table.is_cuda)
        self._arrived = torch.cuda.current_stream(table.device).record_event() if table.is_cuda else None
        self.taken, self._rows, self._tops = taken, rows, tops
        self.left: set[int] = set()  # slots whose sequence has left since: what was drawn for it is dropped

    def wait(self) -> None:
        """The one place where the host waits for a step."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def tokens(self) -> list[Token]:
        """In the order of the slots."""
        self.wait()
        table = self._table.numpy()[self._rows]
        half = table.shape[1] // 2
        logprobs = table[:, half:].astype(np.int32).view(np.float32)
        tops = repeat(())
        if half > 1:
            tops = map(_top, self._tops, table[:, 1:half].tolist(), logprobs[:, 1:].tolist())
        tokens = list(map(Token, self.taken, table[:, 0].tolist(), logprobs[:, 0].tolist(), tops))
        return [token for token in tokens if token.row not in self.left] if self.left else tokens


def _top(num: int, ids: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids[:num], logprobs[:num], strict=True))


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the host on the device. A GPU gets it behind what it is at, and the host does not wait for that."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
