"""Drawing on a GPU in three or four kernels, where there is no penalty and no list of tops."""

# Triton is not installed everywhere, and its types know nothing of launches: a kernel's constexpr takes plain numbers
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
from torch import Tensor

from glade.infer.captured.instructions import overlapping
from glade.infer.captured.kernels import draw as kernels
from glade.infer.endings import Endings
from glade.infer.sampler import Rules

_PARTS = 32
_WIDE = 2**13  # numbers of a row that a program looks at together


def suits(rules: Rules, most_tops: int) -> bool:
    return not (rules.penalized or most_tops)


def draw_(
    logits: Tensor,
    rules: Rules,
    seeds: Tensor,
    slots: Tensor,
    positions: Tensor,
    unread: Tensor,
    endings: Endings | None = None,
) -> Tensor:
    """What `glade.infer.sampler.draw` draws with `gumbel_noise`, its log-probability beside it.

    Args:
        logits:    [B, vocab] fp32
        seeds:     [B] int64
        slots:     [B] int64, of each row its place in the two tables:
        positions: [slots] int64, of the token to be drawn
        unread:    [slots] int64, where the ids are put
        endings:   if there are any, slots whose answers these ids end step aside (`Endings.step_aside_`)
    Returns:
        [B, 2] int64: the id, and the bits of its log-probability under the logits, fp32.
    """
    B, vocab = logits.shape
    parts = min(_PARTS, triton.next_power_of_2(vocab))
    block = triton.next_power_of_2(triton.cdiv(vocab, parts))
    tops, sums, bests = torch.empty(3, B, parts, device=logits.device).unbind()
    top_ids, best_ids = torch.empty(2, B, parts, dtype=torch.int32, device=logits.device).unbind()
    report = torch.empty(B, 2, dtype=torch.int64, device=logits.device)
    overlap = overlapping(logits.device)
    stride, grid = logits.stride(0), (B, parts)
    kernels.tops_kernel[grid](logits, stride, vocab, tops, top_ids, sums, BLOCK=block, PARTS=parts, **overlap)
    kept = (None, None, None)
    if rules.widest:
        masses, floors = torch.empty(B, vocab, device=logits.device), torch.empty(B, device=logits.device)
        kept = (masses, floors, torch.empty(B, dtype=torch.int32, device=logits.device))
        wide = min(triton.next_power_of_2(vocab), _WIDE)
        kernels.restrict_kernel[(B,)](
            logits, stride, vocab, tops, rules.temperature, rules.top_k, rules.top_p, *kept,
            PARTS=parts, BLOCK=wide, num_warps=max(1, wide // 512), **overlap,
        )  # fmt: skip
    if rules.drawn:
        kernels.noise_kernel[grid](
            logits, stride, vocab, tops, rules.temperature, *kept, rules.min_p, seeds, slots, positions,
            bests, best_ids, BLOCK=block, PARTS=parts, INTERPRETED=logits.device.type == "cpu", **overlap,
        )  # fmt: skip
    kernels.choose_kernel[(B,)](
        logits, stride, vocab, tops, top_ids, sums, bests, best_ids, rules.temperature, slots, unread, report,
        positions, None if endings is None else endings.table, 0 if endings is None else endings.spare,
        PARTS=parts, DRAWN=rules.drawn, STOPS=0 if endings is None else endings.most_stops, **overlap,
    )  # fmt: skip
    return report
