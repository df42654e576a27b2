"""The joint projection's gradient, which ops write slice by slice: the bits of the one that autograd lays together."""

import pytest
import torch

from glade.model import LanguageModel, ModelConfig
from glade.ops import parts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mixer", ["gdn", "gdn2", "kda", "gla", "retnet"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_bits(mixer, packed, monkeypatch) -> None:
    model = LanguageModel(ModelConfig(mixer=mixer, dim=128, num_layers=2, num_heads=2, vocab_size=64)).cuda()
    ids = torch.randint(64, (1, 150), device="cuda")
    cu_seqlens = torch.tensor([0, 40, 150], device="cuda", dtype=torch.int32) if packed else None

    def gradients() -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, targets=ids, cu_seqlens=cu_seqlens)[0].mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    asked = []
    serves = parts.serves
    monkeypatch.setattr(parts, "serves", lambda x: asked.append(serves(x)) or asked[-1])
    beside = gradients()
    assert any(asked)
    monkeypatch.setattr(parts, "serves", lambda x: False)
    assert all(torch.equal(x, y) for x, y in zip(beside, gradients(), strict=True))
