"""AdamW with the right groups: what is a map between spaces decays, what is a scale, a bias or a code does not."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from glade.train.config import LoopSettings

# by the last part of the name: rates and offsets of the decay
_NEVER = ("A_log", "dt_bias")


def decays(name: str, parameter: nn.Parameter, embeddings: set[str]) -> bool:
    """Whether weight decay applies: to matrices and convolution taps that are no embedding."""
    return parameter.dim() >= 2 and name not in embeddings and name.rpartition(".")[2] not in _NEVER


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimiser, decayed and not; every trainable parameter is in exactly one.

    A head tied to the embedding is the embedding, so it does not decay; an untied head is a matrix and does.
    """
    embeddings = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with_decay = [p for name, p in trainable if decays(name, p, embeddings)]
    without = [p for name, p in trainable if not decays(name, p, embeddings)]
    return [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]


def peak_learning_rate(settings: LoopSettings, dim: int) -> float:
    """`train.lr`, or for pretraining 0.004 at width 128 falling as 1 / sqrt(width): wider models need smaller steps."""
    return settings.lr if settings.lr is not None else 0.004 * (128 / dim) ** 0.5


def build_optimizer(model: nn.Module, settings: LoopSettings, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def clip_in_step(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float) -> Tensor:
    """The norm of all gradients; where it is above `clip` (0: never) the next step scales them down to it.

    A fused optimiser does so on its way through them, by what a gradient scaler would tell it: a pass over all
    gradients less than `nn.utils.clip_grad_norm_`.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip else None  # type: ignore[attr-defined]
    return norm
