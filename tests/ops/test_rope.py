"""rope: numbers worked out by hand, what it preserves, and that scores know distances only."""

import math

import pytest
import torch

from glade.ops import rope


def test_golden_numbers() -> None:
    """Four channels, positions 0 to 2: the pair (0, 2) turns by 1 radian a token, the pair (1, 3) by 1/100."""
    x = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64).expand(1, 3, 1, 4)
    turned = rope(x, torch.arange(3))
    for p in range(3):
        right = [
            math.cos(p),
            2 * math.cos(p / 100) - 3 * math.sin(p / 100),
            math.sin(p),
            3 * math.cos(p / 100) + 2 * math.sin(p / 100),
        ]
        torch.testing.assert_close(turned[0, p, 0], torch.tensor(right, dtype=torch.float64))


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(2, 1, 3, 8)
    assert torch.equal(rope(x, torch.zeros(1, dtype=torch.int64)), x)


@pytest.mark.parametrize("dims", [None, 4, 2, 0])
def test_partial_leaves_the_other_channels_alone(dims) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.arange(3, 8)
    turned = rope(x, positions, dims=dims)
    d = 8 if dims is None else dims
    assert torch.equal(turned[..., d:], x[..., d:])
    torch.testing.assert_close(turned[..., :d], rope(x[..., :d], positions))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dims", [None, 4])
@pytest.mark.parametrize("shift", [1, 1000])
def test_scores_depend_on_distance_only(dims, shift) -> None:
    q, k = torch.randn(2, 1, 9, 2, 8, dtype=torch.float64)

    def scores(offset: int) -> torch.Tensor:
        positions = torch.arange(9) + offset
        turned = (rope(x, positions, dims=dims) for x in (q, k))
        return torch.einsum("bthk,bshk->bhts", *turned)

    torch.testing.assert_close(scores(shift), scores(0))
    assert not torch.allclose(scores(0), torch.einsum("bthk,bshk->bhts", q, k))


def test_one_row_of_positions_serves_all_rows() -> None:
    x = torch.randn(3, 5, 2, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [0, 1, 0, 1, 2]])
    turned = rope(x, positions)
    for row in range(3):
        assert torch.equal(turned[row], rope(x[row : row + 1], positions[row])[0])


def test_theta_is_the_base_of_the_wave_lengths() -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    turned = rope(x, torch.tensor([100]), theta=100.0)
    right = torch.tensor([0.0, math.cos(10), 0.0, math.sin(10)], dtype=torch.float64)
    torch.testing.assert_close(turned.flatten(), right)


def test_gradients_and_dtype() -> None:
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.arange(4), dims=4), [x])
    assert rope(torch.randn(1, 4, 2, 6).bfloat16(), torch.arange(4), dims=4).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 2, 6)}, r"shape \[4, 2, 6\]; give floating-point \[B, T, H, K\]"),
        ({"positions": torch.arange(3)}, r"shape \[3\]; give int64 \[4\] or \[1, 4\]"),
        ({"positions": torch.arange(4, dtype=torch.int32)}, "positions is torch.int32"),
        ({"dims": 3}, "dims is 3; give an even number from 0 to the 6"),
        ({"dims": 8}, "dims is 8"),
        ({"theta": 0.0}, "theta is 0.0"),
    ],
)
def test_errors_say_what_was_given(change, message) -> None:
    call = {"x": torch.zeros(1, 4, 2, 6), "positions": torch.arange(4), **change}
    with pytest.raises(ValueError, match=message):
        rope(**call)
