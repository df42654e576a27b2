"""How well a query and a key agree: the three score functions of the literature, as dense matrices.

    dot             s = scale q . k
    multiplicative  s = scale q^T W k                   (bilinear; dot is W = 1)
    additive        s = scale v . tanh(W_q q + W_k k)   (one hidden layer on [q; k])

When queries and keys are the same vectors, the matrix of scores is symmetric for dot, for multiplicative if and only if
W is symmetric, and for additive if W_q = W_k.

Sources: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.1; Luong et al. 2015 (arXiv:1508.04025), section 3.1,
"general"; Bahdanau et al. 2015 (arXiv:1409.0473), appendix A.1.2.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["dot", "multiplicative", "additive"]


class AdditiveWeight(NamedTuple):
    """The hidden layer of additive attention, shared by all heads."""

    w_q: Tensor  # [A, K]
    w_k: Tensor  # [A, K]
    v: Tensor  # [A]


ScoreWeight = Tensor | AdditiveWeight | None


def attention_scores(
    q: Tensor, k: Tensor, *, score: Score = "dot", score_weight: ScoreWeight = None, scale: float | None = None
) -> Tensor:
    """The whole matrix of scores, before mask and softmax.

    Args:
        q:            [B, T, H, K]
        k:            [B, S, HKV, K]   H % HKV == 0; query head j meets key head j // (H // HKV)
        score:        "dot", "multiplicative" or "additive", as in the equations of this module
        score_weight: None for dot; W [K, K] or [H, K, K] for multiplicative; AdditiveWeight for additive
        scale:        default K ** -0.5, for additive 1

    Returns:
        [B, H, T, S], at least fp32.

    Raises:
        ValueError: a shape that does not fit, or a weight that is not the score function's.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has shape {list(q.shape)} and k {list(k.shape)}; give [B, T, H, K] and [B, S, HKV, K] with H % HKV = 0"
        )
    check_score(q, score, score_weight)
    if scale is None:
        scale = default_scale(q, score)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], 2)
    if isinstance(score_weight, AdditiveWeight):
        w_q, w_k, v = (w.to(dtype) for w in score_weight)
        hidden = torch.tanh((q @ w_q.T)[:, :, None] + (k @ w_k.T)[:, None])  # [B, T, S, H, A]
        return scale * (hidden @ v).permute(0, 3, 1, 2)
    if score_weight is not None:
        q = bilinear(q, score_weight)
    return scale * torch.einsum("bthk,bshk->bhts", q, k)


def bilinear(q: Tensor, weight: Tensor) -> Tensor:
    """W^T q for W [K, K] or [H, K, K]: the query whose dot product with k is q^T W k."""
    weight = weight.to(q.dtype)
    return q @ weight if weight.dim() == 2 else torch.einsum("bthk,hkl->bthl", q, weight)


def default_scale(q: Tensor, score: Score) -> float:
    return 1.0 if score == "additive" else q.shape[-1] ** -0.5


def check_score(q: Tensor, score: Score, weight: ScoreWeight) -> None:
    """Raises ValueError unless the weight is one of this score function for q [B, T, H, K]."""
    H, K = q.shape[2:]
    if score == "dot":
        if weight is not None:
            raise ValueError(
                "score 'dot' has no weight, but score_weight was given; leave it out or name another score"
            )
    elif score == "multiplicative":
        if not isinstance(weight, Tensor) or weight.shape not in ((K, K), (H, K, K)):
            given = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"score 'multiplicative' was given {given}; give W [{K}, {K}] or [{H}, {K}, {K}]")
    elif score == "additive":
        if not isinstance(weight, AdditiveWeight):
            raise ValueError(f"score 'additive' was given {type(weight).__name__}; give an AdditiveWeight(w_q, w_k, v)")
        A = weight.v.shape[-1] if weight.v.dim() else 0
        shapes = [list(w.shape) for w in weight]
        if shapes != [[A, K], [A, K], [A]]:
            raise ValueError(f"score_weight has shapes {shapes}; give w_q [A, {K}], w_k [A, {K}], v [A]")
    else:
        raise ValueError(f"score is {score!r}; give 'dot', 'multiplicative' or 'additive'")
