"""Losses as pure functions of what a model returned."""

from torch import Tensor


def next_token_loss(losses: Tensor, num_tokens: int) -> Tensor:
    """The mean over `num_tokens` of the per-token losses of one forward pass (masked targets count for nothing).

    `num_tokens` is that of the whole optimiser step, so that the passes of a step add up to its mean loss.
    """
    return losses.sum() / num_tokens
