"""Weights cast all at once: the bits of the pass in which autocast casts each of them, and fewer copies."""

import pytest
import torch
from torch import nn

from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.ops.many import copy_all
from glade.ops.together import together
from glade.train.casts import cast_weights, reading
from glade.train.loss import token_losses

MIXERS = {
    "gdn": {},
    "gdn2": {},
    "kda": {},
    "gla": {"ffn": "gelu"},
    "retnet": {"ffn": "none"},
    "kla": {},
    "softmax": {},
}


def model_of(mixer, **options):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(mixer=mixer, num_layers=2, dim=32, num_heads=2, vocab_size=50, **options))


def pass_of(model, cast):
    """Losses and gradients, and what was cast."""
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        weights = cast_weights(model, torch.bfloat16) if cast else {}
        losses, _ = token_losses(reading(model, weights), ids, ids.roll(-1, 1), None)
    return losses, weights


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_same_bits(mixer):
    model = model_of(mixer, **MIXERS[mixer])
    parameters = dict(model.named_parameters())
    losses, none = pass_of(model, cast=False)
    expected = torch.autograd.grad(losses.sum(), list(parameters.values()))
    cast_losses, weights = pass_of(model, cast=True)
    assert not none and set(weights) == {
        f"{name}.weight" for name, m in model.layers.named_modules(prefix="layers") if type(m) is nn.Linear
    }
    assert torch.equal(cast_losses, losses)
    found = torch.autograd.grad(cast_losses.sum(), list(parameters.values()), retain_graph=True)
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    # as a recording asks for them: of what was cast, still in its dtype
    read = [weights.get(name, p) for name, p in parameters.items()]
    narrow = torch.autograd.grad(cast_losses.sum(), read)
    kept = [torch.empty_like(p) for p in parameters.values()]
    copy_all(kept, narrow)
    assert {x.dtype for x in narrow} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(x, y) for x, y in zip(kept, expected, strict=True))


@pytest.mark.parametrize("mixer", ["gdn", "kda", "gla"])
def test_joined_maps_are_laid_together(mixer, monkeypatch):
    """No copy of a weight remains: torch.cat sees none."""
    model, seen = model_of(mixer), []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *args: seen.extend(tensors) or cat(tensors, *args))
    _, weights = pass_of(model, cast=True)
    copies = {x.data_ptr() for x in weights.values()}
    assert not any(x.data_ptr() in copies for x in seen)


def test_only_what_is_trained_in_fp32_is_cast():
    model = model_of("gdn")
    model.layers[0].requires_grad_(False)
    assert all(name.startswith("layers.1.") for name in cast_weights(model, torch.bfloat16))
    assert cast_weights(model.bfloat16(), torch.float16) == {}
    assert reading(model, {}) is model


def test_together():
    whole = torch.randn(6, 3)
    apart = [whole[:2].clone().requires_grad_(), whole[2:].clone().requires_grad_()]
    beside = [x.detach().requires_grad_() for x in whole.split([2, 4])]
    upstream = torch.randn(6, 3)
    for parts, view in ((apart, False), (beside, True)):
        y = together(parts)
        assert torch.equal(y, whole) and (y.data_ptr() == whole.data_ptr()) is view
        assert torch.equal(torch.cat(torch.autograd.grad(y, parts, upstream)), upstream)
    assert together(beside[::-1]).data_ptr() != whole.data_ptr()
    assert together([whole[:, :2].detach()]).is_contiguous()
