"""A training step on a GPU is the step of the CPU: losses and gradients, and nothing kept makes a difference."""

from typing import Any

import pytest
import torch

from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.train.config import TrainSettings
from glade.train.loop import Pass, Trainer
from glade.train.optim import build_optimizer
from glade.train.run import precision_context

gpu = pytest.mark.gpu

MIXERS = ("gdn", "gdn2", "kda", "gla", "kla", "delta", "retnet", "linear", "softmax", "gdn swa")
# loss, and each gradient by |g - right| / |right|: bf16 products, each rounding 2^-9, through two layers
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-4, 5e-2)}


class Objective:
    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def forward(self, step, part):
        losses, _ = self.model(ids=self.ids, targets=self.ids.roll(-1, 1), return_state=False)
        return Pass(losses.mean(), self.ids.numel())

    def batch(self, step):
        return {"ids": self.ids}


def step(mixer, device, dtype, precision, recompute="none"):
    """Loss and gradients by name."""
    torch.manual_seed(0)
    layers = {"mixer": mixer} if " " not in mixer else {"layers": mixer, "window": 40}
    config = ModelConfig(num_layers=2, dim=128, num_heads=2, vocab_size=101, tie_embeddings=False, **layers)
    model = LanguageModel(config).to(device, dtype).train()
    ids = torch.randint(0, 101, (3, 150), generator=torch.Generator().manual_seed(1)).to(device)
    changes: dict[str, Any] = {"precision": precision, "recompute": recompute}
    settings = TrainSettings(**changes)
    optimizer = build_optimizer(model, settings, lr=1e-3)
    context = precision_context(precision, torch.device(device))
    trainer = Trainer(model, Objective(model, ids), optimizer, settings, context, 1e-3)
    loss = trainer._backward(0, 0).loss.item()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients


def worst(mixer, device, dtype, precision, recompute="none"):
    """Relative errors of the loss and of the gradients against the CPU in fp64."""
    right_loss, right = step(mixer, "cpu", torch.float64, "fp32")
    loss, gradients = step(mixer, device, dtype, precision, recompute)
    assert gradients.keys() == right.keys()
    errors = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in right.items()}
    name = max(errors, key=errors.__getitem__)
    return abs(loss / right_loss - 1), errors[name], name


@gpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_is_that_of_the_cpu(mixer, precision):
    loss, gradient, name = worst(mixer, "cuda", torch.float32, precision)
    assert loss <= TOLERANCES[precision][0]
    assert gradient <= TOLERANCES[precision][1], name


@gpu
@pytest.mark.parametrize("recompute", ["op", "layer"])
@pytest.mark.parametrize("mixer", ["gdn", "gdn2", "gla"])
def test_recomputing_gives_the_same_bits(mixer, recompute):
    loss, gradients = step(mixer, "cuda", torch.float32, "bf16")
    other_loss, others = step(mixer, "cuda", torch.float32, "bf16", recompute)
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name
