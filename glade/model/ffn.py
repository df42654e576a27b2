"""Feed-forward networks: what a block does to each token by itself.

Each answers `forward(x) -> (y, load_balance)`, the second None but for the mixture of experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glade.model.config import ModelConfig
from glade.model.mixer import joint, matmul_flops
from glade.ops import swiglu


class SwiGLU(nn.Module):
    """y = down(silu(gate x) * up x). Source: arXiv:2002.05202."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(swiglu(joint(x, self.joined_maps())[0])), None

    def joined_maps(self) -> Sequence[nn.Linear]:
        """Those that `joint` applies as one, in its order."""
        return self.gate, self.up

    def flops_per_token(self) -> int:
        return matmul_flops(self)


class GELU(nn.Module):
    """y = down(gelu(up x)), gelu in its tanh form, as GPT-2 has it. Source: arXiv:1606.08415."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(F.gelu(self.up(x), approximate="tanh")), None

    def flops_per_token(self) -> int:
        return matmul_flops(self)


class MoE(nn.Module):
    """Mixture of SwiGLU experts: each token goes to its k most probable ones, and to a shared one if there is one.

        p = softmax(router x) in fp32 at least,  E = top k of p,  y = sum_{e in E} p_e / sum_E p * expert_e(x)
                                                                      + sigmoid(shared_gate x) * shared(x)

    The load-balancing loss is num_experts * sum_e f_e P_e, with f_e the share of assignments expert e received and
    P_e its mean probability: 1 when balanced. No token is dropped.
    Sources: arXiv:2101.03961 (loss), 2401.06066 (shared expert), Qwen3-Next (its gate, and the renormalised top k).
    """

    def __init__(
        self, dim: int, hidden: int, num_experts: int, experts_per_token: int, shared_hidden: int, renormalize: bool
    ) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.renormalize = renormalize
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.shared = SwiGLU(dim, shared_hidden, bias=False) if shared_hidden else None
        self.shared_gate = nn.Linear(dim, 1, bias=False) if shared_hidden else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, D]
        logits = self.router(tokens)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # [tokens, k]
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        y = self._experts(tokens, weights, chosen).view(x.shape)
        if self.shared is not None and self.shared_gate is not None:
            y = y + torch.sigmoid(self.shared_gate(x)) * self.shared(x)[0]
        return y, self._load_balance(probabilities, chosen)

    def _experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Assignments sorted by expert, one SwiGLU per expert on its slice, the answers put back in token order."""
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.gate)).tolist()
        parts = tokens[order // self.experts_per_token].split(counts)
        answers = [self._expert(e, part) for e, part in enumerate(parts) if len(part)]
        if not answers:
            return tokens
        # a gather and a sum, not index_add: the order of the additions is fixed, so runs repeat to the bit
        answer = torch.cat(answers)[order.argsort()].view(*chosen.shape, -1)  # [tokens, k, D]
        return (answer * weights[..., None].to(answer.dtype)).sum(1)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate[e])) * F.linear(x, self.up[e]), self.down[e])

    def _load_balance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        tokens, num_experts = probabilities.shape
        share = F.one_hot(chosen, num_experts).float().sum((0, 1)) / max(chosen.numel(), 1)
        return num_experts * (share * probabilities.sum(0)).sum() / max(tokens, 1)

    def flops_per_token(self) -> int:
        per_expert = 2 * (self.gate[0].numel() + self.up[0].numel() + self.down[0].numel())
        return matmul_flops(self) + self.experts_per_token * per_expert


def make_ffn(config: ModelConfig) -> SwiGLU | GELU | MoE | None:
    """The network of one block of a resolved config; None for `ffn="none"`."""
    if config.ffn == "none":
        return None
    if config.ffn == "moe":
        assert config.expert_dim and config.num_experts and config.experts_per_token, "config is not resolved"
        return MoE(
            config.dim,
            config.expert_dim,
            config.num_experts,
            config.experts_per_token,
            config.shared_expert_dim or 0,
            config.renormalize,
        )
    assert config.ffn_dim and config.ffn_bias is not None, "config is not resolved"
    return (SwiGLU if config.ffn == "swiglu" else GELU)(config.dim, config.ffn_dim, config.ffn_bias)
