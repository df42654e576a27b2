"""The helpers that give cu_seqlens its one meaning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glade.ops.packing import check_cu_seqlens, document_borders, document_ids, document_positions, once


def test_an_example_with_empty_documents() -> None:
    cu_seqlens = torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32)
    assert check_cu_seqlens(cu_seqlens, 1) == 5
    assert document_borders(cu_seqlens, 5) == [0, 0, 3, 3, 5, 5]
    assert document_ids(cu_seqlens, 5).tolist() == [1, 1, 1, 3, 3]
    assert document_positions(cu_seqlens, 5).tolist() == [0, 1, 2, 0, 1]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.sampled_from([torch.int32, torch.int64]))
def test_ids_and_positions_are_those_of_a_loop(lengths, dtype) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    ids, positions = document_ids(cu_seqlens, sum(lengths)), document_positions(cu_seqlens, sum(lengths))
    assert ids.tolist() == [i for i in range(len(lengths)) for _ in range(lengths[i])]
    assert positions.tolist() == [p for length in lengths for p in range(length)]
    assert ids.dtype == positions.dtype == torch.int64


def test_no_documents() -> None:
    cu_seqlens = torch.tensor([0])
    assert check_cu_seqlens(cu_seqlens, 1) == 0
    assert document_borders(cu_seqlens, 0) == [0]
    assert document_ids(cu_seqlens, 0).shape == document_positions(cu_seqlens, 0).shape == (0,)


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "message"),
    [
        (torch.tensor([0.0, 3.0]), 1, "cu_seqlens is torch.float32"),
        (torch.tensor([[0, 3]]), 1, r"shape \[1, 2\]; give int32 or int64 \[N \+ 1\]"),
        (torch.tensor([], dtype=torch.int32), 1, r"shape \[0\]"),
        (torch.tensor([0, 3]), 2, r"the batch is 2; reshape to \[1, B \* T, ...\]"),
    ],
)
def test_checks_without_values(cu_seqlens, batch, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(cu_seqlens, batch)


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([1, 5], "runs from 1 to 5; it must run from 0 to"),
        ([0, 4], "runs from 0 to 4"),
        ([0, 6], "runs from 0 to 6"),
        ([0, 3, 2, 5], "falls from 3 to 2 at document 1"),
    ],
)
def test_checks_of_values(borders, message) -> None:
    with pytest.raises(ValueError, match=message):
        document_borders(torch.tensor(borders), 5)


def test_what_is_asked_once() -> None:
    asked = []

    @once
    def ask(borders, number):
        asked.append(number)
        if number < 0:
            raise ValueError("no")
        return borders + number

    borders = torch.tensor([0, 2, 5])
    with torch.inference_mode():
        first = ask(borders, 1)
    assert not first.is_inference() and ask(borders, 1) is first and ask(borders, 2) is not first
    assert ask(borders, 1) is first and asked == [1, 2]
    borders[1] = 3
    assert ask(borders, 1).tolist() == [1, 4, 6] and asked == [1, 2, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            ask(borders, -1)
    assert asked == [1, 2, 1, -1, -1]
    assert ask(borders.clone(), 1) is not ask(borders, 1)
