"""`train.recompute`: the same gradients from less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.train.config import TrainSettings
from glade.train.loop import Pass, Trainer
from glade.train.optim import build_optimizer

MODELS = {
    "hybrid": {"layers": "gdn2 swa gla gdn", "num_layers": 4, "window": 8},
    "dropout": {"mixer": "kda", "num_layers": 2, "residual_dropout": 0.3},
    "post norm": {"mixer": "gdn", "num_layers": 2, "norm_placement": "post"},
    "experts": {"mixer": "gdn", "num_layers": 2, "ffn": "moe", "num_experts": 4, "experts_per_token": 2},
}


class Objective:
    def __init__(self, model):
        self.model = model
        self.ids = torch.randint(0, 31, (2, 70))

    def forward(self, step, part):
        losses, state = self.model(ids=self.ids, targets=self.ids.roll(-1, 1), return_state=False)
        return Pass(losses.mean(), self.ids.numel(), state.load_balance)

    def batch(self, step):
        return {"ids": self.ids}


def gradients(name, recompute):
    """By parameter, and the bytes that were kept for the backward, parameters included."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=32, vocab_size=31, **MODELS[name])).train()
    settings = TrainSettings(recompute=recompute)
    optimizer = build_optimizer(model, settings, lr=0.1)
    trainer = Trainer(model, Objective(model), optimizer, settings, lambda: torch.autocast("cpu", enabled=False), 0.1)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        done = trainer._backward(0, 0)
    assert not model.recompute_layers
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values()), done.loss


@pytest.mark.parametrize("recompute", ["op", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal(name, recompute):
    right, _, loss = gradients(name, "none")
    found, _, other_loss = gradients(name, recompute)
    assert torch.equal(loss, other_loss)
    assert found.keys() == right.keys()
    for parameter, gradient in right.items():
        assert torch.equal(found[parameter], gradient), parameter


def test_less_is_kept():
    none, op, layer = (gradients("hybrid", recompute)[1] for recompute in ("none", "op", "layer"))
    assert layer < op / 2 < none / 2


def test_evaluation_keeps_nothing_to_recompute():
    model = LanguageModel(ModelConfig(dim=32, vocab_size=31, num_layers=2)).eval()
    ids = torch.randint(0, 31, (2, 20))
    with torch.no_grad():
        before = model(ids)[0]
        model.recompute_layers = True
        assert torch.equal(model(ids)[0], before)
