"""What the kernels share: where a chunk's tokens lie, and the masks and decays of its token pairs.

A gate is none (0), scalar (1) or vector (2), as compile-time constants. Logs of decays are held in base 2; the sum G of
a chunk's logs up to and including a row is fp32 for bf16 inputs and fp64 otherwise.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

NONE = tl.constexpr(0)
SCALAR = tl.constexpr(1)
VECTOR = tl.constexpr(2)

LOG2_E = tl.constexpr(1.4426950408889634)
# 2 ** -150 is zero in fp32, so that nothing is lost where one step decays by more, and -inf minus -inf does not arise
LEAST_LOG = tl.constexpr(-150.0)


@triton.jit
def tile_of_program(program, HV):
    """Chunk, head, and both as one number. Heads of a token lie beside each other, and so do the programs that read
    them: at work at the same time, they read whole rows of memory."""
    return program // HV, program % HV, program.to(tl.int64)


@triton.jit
def chunk_tokens(m, num_tokens, chunks_a_row, starts, ends, C: tl.constexpr, PACKED: tl.constexpr):
    """Chunk m: its batch row, its first token there, and how many tokens its sequence has from there on."""
    if PACKED:
        row = tl.zeros([], tl.int32)
        start, end = tl.load(starts + m), tl.load(ends + m)
    else:
        row = m // chunks_a_row
        start, end = (m - row * chunks_a_row) * C, num_tokens
    return row, start, end - start


@triton.jit
def sequence_chunks(n, firsts, chunks_a_row, chunks_a_sequence):
    """The chunks of sequence n: first, end. It is a batch row, or a segment of one, of `chunks_a_sequence` chunks but
    for a row's last; or as `firsts` has it."""
    if firsts is not None:
        first, end = tl.load(firsts + n), tl.load(firsts + n + 1)
    elif chunks_a_sequence is None:
        first, end = n * chunks_a_row, (n + 1) * chunks_a_row
    else:
        sequences_a_row = tl.cdiv(chunks_a_row, chunks_a_sequence)
        row = n // sequences_a_row
        first = row * chunks_a_row + (n - row * sequences_a_row) * chunks_a_sequence
        end = tl.minimum(first + chunks_a_sequence, (row + 1) * chunks_a_row)
    return first, end


@triton.jit
def sequence_tokens(
    first, end, num_tokens, chunks_a_row, starts, ends, C: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Of a sequence's chunks, `first` up to `end`: its batch row, where chunk 0 would begin there, its tokens' end.

    Found once, not in the loop over chunks: to divide takes forty instructions, and behind a load of where a chunk
    begins Triton makes the copies ahead half as far ahead.
    """
    if PACKED:
        row = tl.zeros([], tl.int32)
        origin = tl.load(starts + first, mask=first < end, other=0) - first * C
        end_token = tl.load(ends + first, mask=first < end, other=0)
    else:
        row = first // chunks_a_row
        origin, end_token = -row * chunks_a_row * C, num_tokens
    return row, origin, end_token


# Offsets inside a tile are 32 bits wide, and what is added to a pointer before is a single number of 64: a tile of wide
# offsets would take twice its registers.


@triton.jit
def token_head(x, strides, row, start, head):
    """The pointer at x[row, start, head], or x[row, start, head, 0]."""
    return x + row.to(tl.int64) * strides[0] + start.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def load_rows(x, strides, rows, live, columns, num_columns):
    """[rows, columns] from the pointer x of `token_head`; zeros where there is no token or no column."""
    inside = (rows < live)[:, None] & (columns < num_columns)[None, :]
    return tl.load(x + rows[:, None] * strides[1] + columns[None, :] * strides[3], mask=inside, other=0.0)


@triton.jit
def load_tile(x, strides, tiles, row, start, head, live, first, num_columns, R: tl.constexpr, W: tl.constexpr):
    """x[row, start : start + R, head, first : first + W], zeros where there is no token or no column: by the
    processor's copies of whole tiles where there is a descriptor of x, `tiles`, row by row where it is None."""
    if tiles is None:
        rows, columns = tl.arange(0, R), first + tl.arange(0, W)
        tile = load_rows(token_head(x, strides, row, start, head), strides, rows, live, columns, num_columns)
    else:
        tile = tl.reshape(tiles.load([row, start, head, first]), [R, W])
    return tile


@triton.jit
def load_columns(x, strides, rows, live, columns, num_columns):
    """`load_rows` transposed: [columns, rows]."""
    inside = (columns < num_columns)[:, None] & (rows < live)[None, :]
    return tl.load(x + columns[:, None] * strides[3] + rows[None, :] * strides[1], mask=inside, other=0.0)


@triton.jit
def load_gate(x, strides, rows, live, columns, num_columns, KIND: tl.constexpr):
    """A gate's rows in fp32, [rows, columns] or, where it is scalar, [rows, 1]."""
    if KIND == VECTOR:
        gate = load_rows(x, strides, rows, live, columns, num_columns).to(tl.float32)
    else:
        gate = tl.load(x + rows * strides[1], mask=rows < live, other=0.0).to(tl.float32)[:, None]
    return gate


@triton.jit
def log2_decay(g, G_TYPE: tl.constexpr):
    return tl.maximum(g.to(G_TYPE) * LOG2_E, LEAST_LOG)


@triton.jit
def pair_decay(G, C: tl.constexpr):
    """[C, C]: what is left at the row of what the column wrote, zero for columns after the row. G [C]."""
    rows = tl.arange(0, C)
    lower = rows[:, None] >= rows[None, :]
    exponent = tl.minimum(G[:, None] - G[None, :], 0.0).to(tl.float32)
    return tl.where(lower, tl.exp2(exponent), 0.0)


@triton.jit
def anchors(rows, level):
    """For each row, the first row of the later half of its block of 2 ** (level + 1) rows."""
    half = 1 << level
    return (rows | half) & -half


@triton.jit
def to_anchor(rows, others, level):
    """Whether the log of `others` lies between a row and its anchor: after the earlier of the two, up to the later."""
    anchor = anchors(rows, level)
    return ((others > anchor) & (others <= rows)) | ((others > rows) & (others <= anchor))


@triton.jit
def split_logs(logs, DTYPE: tl.constexpr):
    """A sum of two of DTYPE (16 bits of bf16's, all of fp32's): sums of logs are products with zeros and ones."""
    high = logs.to(tl.float32).to(DTYPE)
    return high, (logs - high.to(logs.dtype)).to(tl.float32).to(DTYPE)


@triton.jit
def level_pairs(later, earlier, level):
    """Bool: the pairs that part at this level, the later of them in the later half."""
    return (((later ^ earlier) >> level) == 1) & (later > earlier)


@triton.jit
def used_in_its_trip(S, live, GATE: tl.constexpr, ERASE: tl.constexpr):
    """S times one, where nothing decays or erases: a loop that did nothing with S but add products to it would not wait
    for them before the next copies overwrite what they read ("Wrong at first" in docs/log.md)."""
    if GATE == NONE and ERASE == NONE:
        S *= tl.where(live > 0, 1.0, 0.0)
    return S
