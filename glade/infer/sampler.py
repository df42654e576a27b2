"""From logits to the next token ids: a pure function, its noise included. Knows nothing of models or text."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glade.infer.config import SamplingParams
from glade.infer.transfer import sent

# tokens among which a nucleus is sought first
_NARROW = 256
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
    columns = (_column(x, logits) for x in (temperature, top_k, top_p, min_p, repetition_penalty))
    rules = _rules(*columns, vocab=logits.shape[1])
    if rules.penalized and seen is None:
        raise ValueError("repetition_penalty is not 1, and seen is None; pass the token counts, [B, vocab]")
    if rules.drawn and noise is None:
        raise ValueError("temperature is not 0, and noise is None; pass gumbel_noise(seeds, positions, vocab)")
    return draw(logits, rules, seen, lambda ids: _given(noise) if ids is None else _given(noise).gather(1, ids))


def _given(noise: Tensor | None) -> Tensor:
    assert noise is not None
    return noise


class Rules(NamedTuple):
    """The settings of `sample` for each of B rows, and what the host knows of them: what there is to do is never read
    back from the device.
    """

    temperature: Tensor  # [B, 1]
    top_k: Tensor  # [B, 1] int64
    top_p: Tensor  # [B, 1]
    min_p: Tensor  # [B, 1]
    penalty: Tensor  # [B, 1]
    drawn: bool  # some row has a temperature
    penalized: bool  # some row has a repetition penalty
    widest: int  # the most tokens that top-k and top-p of one row put in order; 0: every row keeps all
    whole: bool  # some row that is drawn keeps all


class Facts(NamedTuple):
    """What follows from the settings of a row, or of several: what `Rules` says of them."""

    drawn: bool
    penalized: bool
    widest: int
    whole: bool


class Settings(NamedTuple):
    """A row of `Rules`, on the host."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    penalty: float
    facts: Facts


def settings_of(params: SamplingParams, vocab: int) -> Settings:
    """What a row draws by that draws with `params`."""
    p = params
    facts = _facts(p.temperature, p.top_k, p.top_p, p.repetition_penalty, vocab=vocab)
    return Settings(p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, facts)


def rules_of(rows: Sequence[Settings], device: torch.device) -> Rules:
    """The rules of a batch, sent to its device."""
    temperature, top_k, top_p, min_p, penalty, facts = zip(*rows, strict=True)
    floats = sent(torch.tensor([temperature, top_p, min_p, penalty])[:, :, None], device).unbind()
    return Rules._make((floats[0], sent(torch.tensor(top_k)[:, None], device), *floats[1:], *_of_all(facts)))


def rules_of_each(rows: Sequence[Settings], device: torch.device) -> list[Rules]:
    """`rules_of` each row alone."""
    columns = zip(*(column.split(1) for column in rules_of(rows, device)[:5]), strict=True)
    return [Rules._make((*part, *row.facts)) for part, row in zip(columns, rows, strict=True)]


def _rules(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, penalty: Tensor, *, vocab: int) -> Rules:
    rows = zip(*(x.flatten().tolist() for x in (temperature, top_k, top_p, penalty)), strict=True)
    return Rules(temperature, top_k, top_p, min_p, penalty, *_of_all([_facts(*row, vocab=vocab) for row in rows]))


def _facts(temperature: float, top_k: int, top_p: float, penalty: float, *, vocab: int) -> Facts:
    limited = 0 < top_k < vocab
    warm, restricted = temperature != 0, limited or top_p < 1
    width = top_k if limited else vocab
    return Facts(warm, penalty != 1, width if warm and restricted else 0, warm and not restricted)


def _of_all(rows: Sequence[Facts]) -> Facts:
    return Facts(
        drawn=any(facts.drawn for facts in rows),
        penalized=any(facts.penalized for facts in rows),
        widest=max((facts.widest for facts in rows), default=0),
        whole=any(facts.whole for facts in rows),
    )


def draw(logits: Tensor, rules: Rules, seen: Tensor | None, noise: Callable[[Tensor | None], Tensor] | None) -> Tensor:
    """`sample` with its settings as `rules`; ids [B]. On a GPU it waits for nothing.

    noise: the noise of ids [B, n], or of the whole vocabulary for None. Where every row keeps few tokens only theirs is
        asked for
    """
    scores = logits.float()
    if rules.penalized:
        assert seen is not None
        scores = penalize(scores, seen, rules.penalty)
    greedy = scores.argmax(dim=-1)
    if not rules.drawn:
        return greedy
    assert noise is not None
    # from the maximum down, so that no temperature makes the best token infinite
    cold = rules.temperature == 0
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / torch.where(cold, 1.0, rules.temperature)
    if rules.whole:
        drawn = (_restrict(scores, rules) + noise(None)).argmax(dim=-1)
    else:
        best, ids = _nucleus(scores, _limits(rules, scores.shape[1]), rules.top_p, rules.widest)
        drawn = ids.gather(1, (_above_floor(best, rules) + noise(ids)).argmax(dim=-1, keepdim=True))[:, 0]
    return torch.where(cold[:, 0], greedy, drawn)


def penalize(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores of tokens with `seen` > 0 divided by `penalty` where positive, multiplied where negative."""
    weakened = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen > 0, weakened, scores)


def restrict(
    scores: Tensor, *, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0, min_p: float | Tensor = 0.0
) -> Tensor:
    """Scores [B, vocab] with every token that top-k, top-p or min-p (in this order) rules out set to -inf."""
    columns = (_column(x, scores) for x in (1.0, top_k, top_p, min_p, 1.0))
    return _restrict(scores, _rules(*columns, vocab=scores.shape[1]))


def _restrict(scores: Tensor, rules: Rules) -> Tensor:
    vocab = scores.shape[-1]
    if rules.widest:
        k = _limits(rules, vocab)
        best, ids = _nucleus(scores, k, rules.top_p, rules.widest)
        kept = torch.full_like(scores, float("-inf")).scatter(-1, ids, best)
        scores = torch.where((k == vocab) & (rules.top_p >= 1), scores, kept)
    return _above_floor(scores, rules)


def _limits(rules: Rules, vocab: int) -> Tensor:
    """top-k as numbers of tokens, [B, 1]."""
    return torch.where((rules.top_k <= 0) | (rules.top_k > vocab), vocab, rules.top_k)


def _above_floor(scores: Tensor, rules: Rules) -> Tensor:
    """min-p."""
    floor = scores.amax(dim=-1, keepdim=True) + rules.min_p.log()
    return scores.masked_fill(scores < floor, float("-inf"))


def _nucleus(scores: Tensor, k: Tensor, p: Tensor, widest: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores and ids [B, n] of the best tokens, best first, but -inf beyond the k best and, of these, beyond the fewest
    whose probabilities reach p.

    A row that keeps everything may lose its tail. What another row keeps does not depend on the rest of the batch: its
    sums run from its best token down, whatever the `width`, the number of tokens put in order.
    """
    vocab = scores.shape[-1]
    # Sorting the whole vocabulary is what costs. On the CPU, where asking is free, a nucleus that ends early is sought
    # among few tokens first.
    width = width or (min(_NARROW, widest) if scores.device.type == "cpu" else widest)
    top = scores.amax(dim=-1, keepdim=True)
    best, ids = scores.topk(width, dim=-1)
    mass = (best - top).exp()
    up_to = mass.cumsum(dim=-1)
    everything = (scores - top).exp().sum(dim=-1, keepdim=True)
    total = torch.where(k < vocab, up_to.gather(1, k.clamp(max=width) - 1), everything)
    if width < widest:
        enough = torch.where(k < vocab, k <= width, (p >= 1) | (up_to[:, -1:] >= p * total))
        if not bool(enough.all()):
            return _nucleus(scores, k, p, widest, min(16 * width, widest))
    rank = torch.arange(width, device=scores.device)
    # rank 0 stays whatever rounding does; p = 1 keeps tails that rounding pushes to 1
    outside = (rank >= k) | ((up_to - mass >= p * total) & (rank > 0) & (p < 1))
    return best.masked_fill(outside, float("-inf")), ids


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int, ids: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise that is a function of (seed, position, token id) and nothing else.

        -log(-log(1 - w)),   w = (hash(seed, position, id) + 1/2) / 2^32

    So a row draws the same token whatever rows lie beside it, in whatever order, and on any device.

    Args:
        seeds:     [B] int64, from 0
        positions: [B] int64, from 0: of the token to be drawn, in its sequence
        ids:       [B, n] int64, the tokens whose noise is wanted; None is the whole vocabulary
    Returns:
        noise [B, n] fp32, n = vocab without ids
    Source: integer hash by C. Wellons, "hash prospector" (21f0aaad, 735a2d97), whose constants are below 2^31:
        no product leaves int64.
    """
    row = _mix_((seeds >> 32) & _UINT32)
    row = _mix_(row ^ (seeds & _UINT32))
    row = _mix_(row ^ ((positions >> 32) & _UINT32))
    first = _mix_(row ^ (positions & _UINT32))[:, None]
    second = _mix_(first ^ 0x5BF03635)
    ids = torch.arange(vocab, device=seeds.device) if ids is None else ids
    # two rounds with two keys: with one, two rows could hold the same noise in another order
    bits = _mix_(_mix_(ids ^ first).add_(second).bitwise_and_(_UINT32))
    # small w is large noise, and there fp32 is fine-grained; at the other end 1 - w must not round to 0
    w = bits.float().add_(0.5).div_(2.0**32).clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) under which every output bit depends on every input bit.

    In x's own memory: over a whole vocabulary, new memory for every operation would cost more than they do.
    """
    x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(_UINT32)
    x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(_UINT32)
    return x.bitwise_xor_(x >> 15)


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """`value`, a number or one for each row, as a column beside `like` [B, vocab]."""
    column = torch.as_tensor(value, device=like.device)
    return column.expand(like.shape[0])[:, None]
