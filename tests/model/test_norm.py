"""The norms against their formulas, and their precision."""

import pytest
import torch
from torch import Tensor

from glade.model.norm import l2norm, make_norm

EPS = 0.3  # large, so that where it stands shows


def weighted(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norm's answer with random weights, and the formula's."""
    norm = make_norm(name, x.shape[-1], EPS).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    w = dict(norm.named_parameters())
    centred = x - x.mean(-1, keepdim=True)
    layernorm = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    mean_square = x.square().mean(-1, keepdim=True)
    with torch.no_grad():
        formulas = {
            "rmsnorm": lambda: w["weight"] * x / (mean_square + EPS).sqrt(),
            "rmsnorm_eps_outside": lambda: w["weight"] * x / (mean_square.sqrt() + EPS),
            "layernorm": lambda: w["weight"] * layernorm + w["bias"],
            "layernorm_plain": lambda: layernorm,
            "absent": lambda: x,
        }
        return norm(x), formulas[name]()


@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm_eps_outside", "layernorm", "layernorm_plain", "absent"])
def test_a_norm_is_its_formula(name: str) -> None:
    answer, formula = weighted(name, torch.randn(3, 5, 7, dtype=torch.float64))
    torch.testing.assert_close(answer, formula)


@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm_eps_outside", "layernorm", "layernorm_plain"])
def test_half_precision_is_normalised_in_fp32(name: str) -> None:
    """300^2 is more than fp16 holds: squared in fp16 the mean would be infinite."""
    x = 300 * torch.randn(4, 64)
    norm = make_norm(name, 64, 1e-5)
    with torch.no_grad():
        exact = norm(x.half().float())
        assert torch.equal(norm.half()(x.half()), exact.half())


def test_l2norm_makes_unit_heads_and_keeps_zeros() -> None:
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(l2norm(x).square().sum(-1), torch.ones(2, 3, 4), rtol=1e-5, atol=1e-5)
    assert not l2norm(torch.zeros(1, 4)).any()
    assert torch.equal(l2norm(x.bfloat16()), l2norm(x.bfloat16().float()).bfloat16())
