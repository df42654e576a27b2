"""Which parameters decay."""

import pytest
import torch

from glade.model.config import MIXERS, ModelConfig
from glade.model.lm import LanguageModel
from glade.train.config import TrainSettings
from glade.train.optim import build_optimizer, clip_in_step, parameter_groups, peak_learning_rate


def build(mixer="gdn2", **changes):
    return LanguageModel(ModelConfig(mixer=mixer, vocab_size=16, dim=16, num_layers=1, **changes))


def names_of(model, group):
    by_parameter = {p: name for name, p in model.named_parameters()}
    return {by_parameter[p] for p in group["params"]}


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_is_in_one_group(mixer):
    model = build(mixer, learned_positions=8)
    decayed, free = (names_of(model, group) for group in parameter_groups(model, 0.1))
    assert not decayed & free
    assert decayed | free == {name for name, _ in model.named_parameters()}
    for name in free:
        assert model.get_parameter(name).dim() < 2 or name in ("embed.weight", "positions.weight"), name
    assert not any(part in name for name in decayed for part in ("norm", "bias", "A_log", "embed", "positions"))
    assert any("proj.weight" in name for name in decayed)


def test_an_untied_head_decays_and_a_tied_one_does_not():
    untied, tied = build(tie_embeddings=False), build()
    assert "lm_head.weight" in names_of(untied, parameter_groups(untied, 0.1)[0])
    assert "embed.weight" in names_of(tied, parameter_groups(tied, 0.1)[1])


def test_decay_moves_only_what_decays():
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainSettings(weight_decay=0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = names_of(model, optimizer.param_groups[0])
    for name, p in model.named_parameters():
        expected = before[name] * 0.95 if name in decayed else before[name]
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e3])
def test_a_step_that_clips(clip):
    """Is torch's clipping and a step, and to the bit where nothing is clipped."""
    models = [build(), build()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, TrainSettings(), lr=0.1) for model in models]
    for seed in range(3):
        for model in models:
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        norm = clip_in_step(optimizers[0], models[0].parameters(), clip)
        assert norm == torch.nn.utils.clip_grad_norm_(models[1].parameters(), clip or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
    for p, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, right, rtol=0 if clip != 0.3 else 1e-5, atol=0 if clip != 0.3 else 1e-6)


def test_peak_learning_rate():
    assert peak_learning_rate(TrainSettings(), 128) == 0.004
    assert peak_learning_rate(TrainSettings(), 512) == 0.002
    assert peak_learning_rate(TrainSettings(lr=0.5), 512) == 0.5
