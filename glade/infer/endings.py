"""Where answers end, as the device knows it: a step launched before the host has heard of an end leaves it as it is."""

from collections.abc import Collection

import torch
from torch import Tensor

from glade.infer.transfer import sent

PLACE, LAST, STOPS = 0, 1, 2  # columns of the table; stop ids from the third on


class Endings:
    """Of each of `size` slots the row of the state table that it works on, and what ends its answer.

    A slot whose answer has ended steps aside: from then on it works on the spare row, which is nobody's, behind the
    slots' own. Its own state stays as the step that drew the last token left it, until `begin`.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.spare = size
        # [size, 2 + n] int64: the row, the tokens it has read when the last one is drawn, n stop ids (-1: none)
        self.table = torch.tensor([[slot, 0, -1] for slot in range(size)], device=device)

    @property
    def most_stops(self) -> int:
        return self.table.shape[1] - STOPS

    def begin(self, slot: int, last: int, stop_ids: Collection[int]) -> None:
        """An answer that ends with any of `stop_ids`, or when its row has read `last` tokens."""
        if len(stop_ids) > self.most_stops:
            # a power of two, as kernels read them
            missing = (1 << (len(stop_ids) - 1).bit_length()) - self.most_stops
            self.table = torch.nn.functional.pad(self.table, (0, missing), value=-1)
        none = [-1] * (self.most_stops - len(stop_ids))
        self.table[slot] = sent(torch.tensor([slot, last, *stop_ids, *none]), self.table.device)

    def places(self, slots: Tensor) -> Tensor:
        """The rows of the state table that `slots` [B] work on."""
        return self.table[:, PLACE][slots]

    def step_aside_(self, slots: Tensor, ids: Tensor, read: Tensor) -> None:
        """Of slots [B] that have drawn `ids` when they had `read` so many tokens, those that have come to their end."""
        facts = self.table[slots]
        over = (facts[:, STOPS:] == ids[:, None]).any(dim=1) | (read >= facts[:, LAST])
        self.table[slots, PLACE] = facts[:, PLACE].masked_fill(over, self.spare)
