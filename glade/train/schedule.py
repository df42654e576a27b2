"""The learning rate as a pure function of the share of the budget that is used. Knows no steps, tokens or clocks."""

import math


def learning_rate_factor(progress: float, *, schedule: str, warmup: float, decay: float, min_lr: float) -> float:
    """The learning rate over its peak, for `progress` in [0, 1] of the budget.

    It rises linearly over the first `warmup` of the budget (from a small positive value: `progress` counts the step
    being taken), then follows the shape down to `min_lr` at progress 1.
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    start = max(warmup, 1 - decay) if schedule == "wsd" else warmup
    share = min(1.0, max(0.0, (progress - start) / (1 - start))) if start < 1 else 0.0
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    assert schedule in ("linear", "wsd"), schedule
    return 1 - (1 - min_lr) * share
