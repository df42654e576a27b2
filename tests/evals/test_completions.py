"""Log-probabilities and divergences of packed completions against each sequence by itself, in fp64."""

import pytest
import torch

from glade.errors import ConfigError
from glade.evals import completions
from glade.evals.completions import Completion, divergence, logprobs
from glade.model import LanguageModel, ModelConfig

LENGTHS = [(1, 1), (1, 9), (7, 1), (12, 20), (3, 4), (2, 1)]


def made(seed: int, mixer: str = "gdn2", **settings: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = ModelConfig(mixer=mixer, vocab_size=23, dim=16, num_layers=2, num_heads=2, init_std=0.3, **settings)
    return LanguageModel(config).double().train()


def drawn() -> list[Completion]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(23, (a + b,), generator=generator).tolist() for a, b in LENGTHS]
    return [Completion(tuple(x[:a]), tuple(x[a:])) for x, (a, _) in zip(ids, LENGTHS, strict=True)]


def distributions(model: LanguageModel, one: Completion) -> torch.Tensor:
    ids = torch.tensor([[*one.prompt, *one.ids]])
    with torch.no_grad():
        return model.eval()(ids)[0][0, len(one.prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("pack", [1, 15, 10_000])
@pytest.mark.parametrize("mixer", ["gdn2", "softmax"])
def test_logprobs(mixer: str, pack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_PACK_TOKENS", pack)
    model = made(1, mixer)
    found = logprobs(model, drawn())
    assert model.training
    for one, x in zip(drawn(), found, strict=True):
        expected = distributions(model, one).gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pack", [1, 15 * 23, 10_000])
def test_divergence(pack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_LOGITS", pack)
    model, base = made(1), made(2)
    for one, x in zip(drawn(), divergence(model, base, drawn()), strict=True):
        p, q = distributions(model, one), distributions(base, one)
        torch.testing.assert_close(x.double(), (p.exp() * (p - q)).sum(-1), rtol=0, atol=1e-5)
        assert (x > 0).all()
    assert all((x == 0).all() for x in divergence(model, model, drawn()))


def test_no_more_tokens_than_positions() -> None:
    model = made(1, "softmax", learned_positions=16)
    with pytest.raises((ConfigError, ValueError), match="16"):
        logprobs(model, [Completion((1,), tuple(range(20)))])
    assert logprobs(model, []) == []
