"""parts: gradients of slices that ops write beside each other, and every way in which they may not."""

import pytest
import torch

from glade.ops import parts
from glade.ops.parts import gradient_like, split


class Scaled(torch.autograd.Function):
    """2 x, which asks for the room of its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return gradient_like(x).copy_(2 * dy)


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch) -> None:
    monkeypatch.setattr(parts, "serves", lambda x: x.requires_grad)


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """A list that grows by one for each slice that was copied in."""
    seen: list[int] = []
    same_place = parts.same_place

    def counted(x, y):
        if not same_place(x, y):
            seen.append(1)
            return False
        return True

    monkeypatch.setattr(parts, "same_place", counted)
    return seen


def gradient(use, sizes=(4, 6, 2)):
    x = torch.randn(2, 3, sum(sizes), requires_grad=True)
    joint = x * 1  # as a projection makes it: not a leaf
    loss = sum((y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum() for y in use(*split(joint, sizes)))
    plain = sum((y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum() for y in use(*x.split(list(sizes), -1)))
    (found,), (right,) = torch.autograd.grad(loss, x), torch.autograd.grad(plain, x)
    assert torch.equal(found, right)
    return found


def test_all_beside_each_other(copies) -> None:
    gradient(lambda a, b, c: [Scaled.apply(x) for x in (a, b, c)])
    assert not copies


def test_seen_as_heads(copies) -> None:
    gradient(lambda a, b, c: [Scaled.apply(a.unflatten(-1, (2, 2))), Scaled.apply(b.unflatten(-1, (3, 2))), c * 1])
    assert len(copies) == 1


def test_a_slice_cut_again(copies) -> None:
    gradient(lambda a, b, c: [Scaled.apply(x) for x in (a, *split(b, (2, 3, 1)), c)])
    assert not copies
    gradient(lambda a, b, c: [Scaled.apply(x) for x in (a, *split(b, (2, 3, 1))[:2])])
    assert not copies
    gradient(lambda a, b, c: [a.exp(), *(Scaled.apply(x) for x in split(b, (2, 3, 1))), c.exp()])
    assert len(copies) == 2


def test_a_slice_cut_twice_and_used_itself() -> None:
    gradient(lambda a, b, c: [Scaled.apply(x) for x in (*split(b, (2, 4)), *split(b, (3, 3)), a, b)])
    gradient(lambda a, b, c: [b.exp(), *(Scaled.apply(x) for x in split(b, (2, 4))), c])


def test_one_that_does_not_ask_and_one_that_is_not_used(copies) -> None:
    gradient(lambda a, b, c: [Scaled.apply(a), b.exp()])
    assert len(copies) == 1


def test_a_slice_used_twice(copies) -> None:
    """Both gradients must not be written to one place."""
    gradient(lambda a, b, c: [Scaled.apply(a), Scaled.apply(a), Scaled.apply(b), a.exp()])
    assert len(copies) == 1


def test_parts_of_slices_and_rows_transposed_have_no_room(copies) -> None:
    gradient(lambda a, b, c: [Scaled.apply(a[:, 1:]), Scaled.apply(b.transpose(0, 1)), Scaled.apply(c[..., :1])])
    assert len(copies) >= 2


def test_backward_twice() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    a, b = split(x * 1, (3, 5))
    loss = (Scaled.apply(a).sum() + Scaled.apply(b).square().sum()) * 1
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, kept) and torch.equal(again, kept) and again.data_ptr() != first.data_ptr()


def test_a_backward_that_stops_at_the_slices() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    a, b = split(x * 1, (3, 5))
    loss = Scaled.apply(a).sum() + Scaled.apply(b).sum()
    torch.autograd.grad(loss, [a, b], retain_graph=True)
    (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, torch.full_like(found, 2.0))


def test_nothing_is_left_behind() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    a, b = split(x * 1, (3, 5))
    (Scaled.apply(a).sum() + Scaled.apply(b).sum()).backward()
    del a, b
    assert not parts._rooms
