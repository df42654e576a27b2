"""Losses as pure functions of what a model returned."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def token_losses(model: Callable[..., Any], *row: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The losses of a `glade.train.examples.Row`, [B, T] in nats, and the load-balancing loss of experts."""
    ids, targets, cu_seqlens = row
    losses, state = model(ids=ids, targets=targets, cu_seqlens=cu_seqlens, return_state=False)
    return losses, state.load_balance


def next_token_loss(losses: Tensor, num_tokens: int) -> Tensor:
    """The mean over `num_tokens` of the per-token losses of one forward pass (masked targets count for nothing).

    `num_tokens` is that of the whole optimiser step, so that the passes of a step add up to its mean loss.
    """
    return losses.sum() / num_tokens
