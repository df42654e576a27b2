"""Weights of 8 bits: how they are rounded, and that a model of them behaves as one of the rounded weights."""

import copy

import pytest
import torch

from glade.errors import ConfigError
from glade.model import LanguageModel, ModelConfig
from glade.model.quantized import Int8Weight, is_quantized, quantize


def make(**options):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**{"vocab_size": 71, "dim": 48, "num_layers": 2} | options)).eval()


def rounded_twin(model):
    """A model in fp32 whose weights are what `quantize` made of those of `model`."""
    twin = LanguageModel(model.config).eval()
    weights = {name: p.dequantized() if isinstance(p, Int8Weight) else p for name, p in model.named_parameters()}
    twin.load_state_dict(weights, strict=False)
    return twin


def test_a_row_is_rounded_to_the_nearest_of_255_steps():
    weight = torch.randn(5, 40)
    weight[2] = 0
    rounded = Int8Weight.of(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded.dequantized() - weight).abs() <= step / 2 + 1e-7).all()
    assert rounded.values.dtype == torch.int8 and rounded.values.abs().max() == 127
    assert (rounded.dequantized()[2] == 0).all()
    assert rounded.shape == weight.shape and rounded.dtype == weight.dtype and rounded.numel() == weight.numel()


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "mixer": "softmax"}, {"learned_positions": 20}])
def test_a_model_computes_with_the_rounded_weights(options):
    model = quantize(make(**options))
    twin = rounded_twin(model)
    ids = torch.randint(71, (2, 9))
    with torch.no_grad():
        logits, state = model(ids)
        expected, other = twin(ids)
        assert torch.equal(logits, expected)
        losses, _ = model(ids, targets=ids)
        assert torch.equal(losses, twin(ids, targets=ids)[0])
        assert torch.equal(model.step_(ids[:, 0], state), twin.step_(ids[:, 0], other))
    assert is_quantized(model) and not is_quantized(twin)
    assert model.num_parameters() == twin.num_parameters()


def test_only_matrices_are_rounded():
    model = quantize(make(learned_positions=20))
    rounded = {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    assert "embed.weight" in rounded and "layers.1.mixer.o_proj.weight" in rounded
    assert all("norm" not in name and "conv" not in name and "positions" not in name for name in rounded)


def test_moves_casts_and_copies():
    model = quantize(make())
    model.to(torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16 and model.embed.weight.values.dtype == torch.int8
    twin = copy.deepcopy(model)
    ids = torch.randint(71, (2, 9))
    with torch.no_grad():
        logits = model(ids)[0]
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, twin(ids)[0])


def test_experts_are_refused():
    with pytest.raises(ConfigError, match="mixture of experts"):
        quantize(make(ffn="moe", num_experts=4))
