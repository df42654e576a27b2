"""The table of block sizes and what `glade bench tune` tries: read without a GPU and without Triton."""

import pytest

from glade.ops.linear_attention.triton.candidates import candidates
from glade.ops.linear_attention.triton.configs import KINDS, Launch, is_scalar, nearest, read_table

ROWS = read_table()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{'-'.join(row.corner)} {row.K} {row.V} {row.wide}")
def test_tune_tries_what_the_table_has(row):
    tried = {(x.name, x.launch) for x in candidates(row.corner, row.wide, row.K, row.V, row.config.chunk)}
    names = {name for name, _ in tried}
    launches = {(name, x) for name, x in row.config._asdict().items() if isinstance(x, Launch) and name in names}
    assert launches <= tried


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{'-'.join(row.corner)} {row.K} {row.V} {row.wide}")
def test_a_call_takes_the_row_that_is_made_for_it(row):
    assert nearest(row.arch, row.corner, row.wide, row.K, row.V) == row.config


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("g", KINDS)
@pytest.mark.parametrize("erase", KINDS)
@pytest.mark.parametrize("write", KINDS)
def test_no_call_takes_a_row_for_other_kernels(g, erase, write, wide):
    corner = (g, erase, write)
    for K, V in ((16, 16), (128, 128), (256, 512)):
        config = nearest(90, corner, wide, K, V)
        rows = [row for row in ROWS if row.config == config and row.wide == wide]
        assert any(is_scalar(row.corner, wide) == is_scalar(corner, wide) for row in rows), (corner, K, V)
