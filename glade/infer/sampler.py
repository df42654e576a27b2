"""From logits to the next token ids: a pure function, its noise included. Knows nothing of models or text."""

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    seen: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw one token id a row from the logits.

    The order, each step on what the one before left:

    1. repetition penalty: a token seen before has its positive logit divided, its negative one multiplied
    2. temperature: the logits are divided by it; 0 takes the most likely token and ends here
    3. top-k: the k most likely tokens stay
    4. top-p: the fewest most likely tokens whose probabilities sum to at least p stay, the crossing one included
    5. min-p: tokens with at least min_p times the probability of the likeliest stay
    6. Gumbel-max: argmax(logits + noise), which draws token i with probability softmax(logits)_i

    Args:
        logits: [B, vocab] any float dtype
        temperature, top_k, top_p, min_p, repetition_penalty: a number, or a tensor [B] with one for each row
        seen:   [B, vocab] how often (or whether) each token occurred; needed by a repetition penalty other than 1
        noise:  [B, vocab] fp32 standard Gumbel noise (`gumbel_noise`); needed unless every temperature is 0
    Returns:
        ids [B] int64
    Raises:
        ValueError: logits that are not [B, vocab], or `seen` or `noise` missing where they are needed.
    Source: Holtzman et al. arXiv:1904.09751 (top-p), Nguyen et al. arXiv:2407.01082 (min-p), Keskar et al.
        arXiv:1909.05858 (repetition penalty), Maddison et al. arXiv:1411.0030 (Gumbel-max).
    """
    if logits.dim() != 2:
        raise ValueError(f"logits are {list(logits.shape)}; expected [B, vocab]")
    scores = logits.float()
    penalty = _column(repetition_penalty, scores)
    if bool((penalty != 1).any()):
        if seen is None:
            raise ValueError("repetition_penalty is not 1, and seen is None; pass the token counts, [B, vocab]")
        scores = penalize(scores, seen, penalty)
    greedy = scores.argmax(dim=-1)
    heat = _column(temperature, scores)
    cold = heat[:, 0] == 0
    if bool(cold.all()):
        return greedy
    if noise is None:
        raise ValueError("temperature is not 0, and noise is None; pass gumbel_noise(seeds, positions, vocab)")
    # from the maximum down, so that no temperature makes the best token infinite
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / torch.where(heat == 0, 1.0, heat)
    scores = restrict(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    return torch.where(cold, greedy, (scores + noise).argmax(dim=-1))


def penalize(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores of tokens with `seen` > 0 divided by `penalty` where positive, multiplied where negative."""
    weakened = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen > 0, weakened, scores)


def restrict(
    scores: Tensor, *, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0, min_p: float | Tensor = 0.0
) -> Tensor:
    """Scores [B, vocab] with every token that top-k, top-p or min-p (in this order) rules out set to -inf."""
    k, p = _column(top_k, scores), _column(top_p, scores)
    vocab = scores.shape[-1]
    k = torch.where((k <= 0) | (k > vocab), vocab, k)
    if bool((k < vocab).any() | (p < 1).any()):
        # sorting the whole vocabulary is what costs: no further than the longest list that is kept
        best, ids = scores.topk(int(k.max()), dim=-1)
        rank = torch.arange(best.shape[-1], device=scores.device)
        best = best.masked_fill(rank >= k, float("-inf"))
        probability = best.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        # rank 0 stays whatever rounding does to `before`; p = 1 keeps tails that rounding pushes to 1
        best = best.masked_fill((before >= p) & (rank > 0) & (p < 1), float("-inf"))
        scores = torch.full_like(scores, float("-inf")).scatter(-1, ids, best)
    floor = scores.amax(dim=-1, keepdim=True) + _column(min_p, scores).log()
    return scores.masked_fill(scores < floor, float("-inf"))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise that is a function of (seed, position, token id) and nothing else.

        -log(-log(1 - w)),   w = (hash(seed, position, id) + 1/2) / 2^32

    So a row draws the same token whatever rows lie beside it, in whatever order, and on any device.

    Args:
        seeds:     [B] int64, from 0
        positions: [B] int64, from 0: of the token to be drawn, in its sequence
    Returns:
        noise [B, vocab] fp32
    Source: integer hash by C. Wellons, "hash prospector" (21f0aaad, 735a2d97), whose constants are below 2^31:
        no product leaves int64.
    """
    row = _mix((seeds >> 32) & _UINT32)
    row = _mix(row ^ (seeds & _UINT32))
    row = _mix(row ^ ((positions >> 32) & _UINT32))
    first = _mix(row ^ (positions & _UINT32))[:, None]
    second = _mix(first ^ 0x5BF03635)
    ids = torch.arange(vocab, device=seeds.device)
    # two rounds with two keys: with one, two rows could hold the same noise in another order
    bits = _mix((_mix(ids ^ first) + second) & _UINT32)
    # small w is large noise, and there fp32 is fine-grained; at the other end 1 - w must not round to 0
    w = ((bits.float() + 0.5) / 2.0**32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-w))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) under which every output bit depends on every input bit."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _UINT32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _UINT32
    return x ^ (x >> 15)


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """`value`, a number or one for each row, as a column beside `like` [B, vocab]."""
    column = torch.as_tensor(value, device=like.device)
    return column.expand(like.shape[0])[:, None]
