"""The records of src/decode/program.h as ctypes structures: what each member means is said there."""

from ctypes import Structure, Union, c_double, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

from glade.ops import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
NOWHERE = -1
MOST_PARTS = 8


class Op(IntEnum):
    EMBED, ROTATION, MATMUL, LINEAR_HEADS, ATTENTION_HEADS, NORMALIZE, COPY = range(7)


class NormKind(IntEnum):
    ABSENT, RMS, RMS_EPS_OUTSIDE, LAYER = range(4)


class Act(IntEnum):
    NONE, SWIGLU, GELU, TANH, SLIDE = range(5)


class Target(IntEnum):
    STORE, ADD, ACCUMULATE, LOGITS = range(4)


class Decay(IntEnum):
    NONE, TABLE, LOGSIGMOID, TEMPERED, SOFTPLUS, BOUNDED = range(6)


class Status(IntEnum):
    FULL, BAD_POSITION, BAD_SLOT, BAD_ID = range(-5, -1)


def _fields(words: str) -> list[tuple[str, type]]:
    """`name` is an int64, `name:d` a double, `name:p` an address."""
    kinds = {"": c_int64, "d": c_double, "p": c_void_p}
    return [(name, kinds[kind]) for name, _, kind in (word.partition(":") for word in words.split())]


class Vector(Structure):
    _fields_ = _fields("data:p dtype")


class Matrix(Structure):
    _fields_ = [*_fields("data:p dtype scales:p"), ("bias", Vector), *_fields("rows columns")]


class Norm(Structure):
    _fields_ = [("kind", c_int64), ("weight", Vector), ("bias", Vector), ("eps", c_double)]


class StateTensor(Structure):
    _fields_ = _fields("data:p dtype row")


class Embed(Structure):
    _fields_ = [("table", Matrix), ("positions", Matrix), ("output", c_int64)]


class Rotation(Structure):
    _fields_ = _fields("frequencies:p num output")


class Part(Structure):
    _fields_ = [("matrix", Matrix), ("output", c_int64)]


class Matmul(Structure):
    _fields_ = [
        ("norm", Norm),
        *_fields("input columns num_parts activation target"),
        ("parts", Part * MOST_PARTS),
    ]


class Projected(Structure):
    _fields_ = [*_fields("input silu"), ("matrix", Matrix)]


class LinearHeads(Structure):
    _fields_ = [
        *_fields("num_heads num_value_heads key_dim value_dim scale:d q k v output taps"),
        *((name, Vector) for name in ("conv_q", "conv_k", "conv_v")),
        *_fields("past_q past_k past_v recurrent silu feature_map unit rotation turned"),
        *_fields("decay decay_heads decay_channels decay_constant:d"),
        ("decay_input", Projected),
        ("a_log", Vector),
        ("dt_bias", Vector),
        *_fields("beta erase write eta kaczmarz clip doubled kaczmarz_eps:d"),
        ("output_norm", Norm),
        ("output_gate", c_int64),
        ("output_gate_input", Projected),
    ]


class AttentionHeads(Structure):
    _fields_ = [
        *_fields("num_heads num_kv_heads key_dim value_dim scale:d q k v gate output"),
        ("q_norm", Norm),
        ("k_norm", Norm),
        *_fields("rotation turned keys values window"),
    ]


class Normalize(Structure):
    _fields_ = [("norm", Norm), *_fields("place width")]


class Copy(Structure):
    _fields_ = _fields("place width state save")


class _Operands(Union):
    _fields_ = [
        ("embed", Embed),
        ("rotation", Rotation),
        ("matmul", Matmul),
        ("linear", LinearHeads),
        ("attention", AttentionHeads),
        ("normalize", Normalize),
        ("copy", Copy),
    ]


class Instruction(Structure):
    _anonymous_ = ("operands",)
    _fields_ = [("op", c_int64), ("operands", _Operands)]


class Run(Structure):
    _fields_ = _fields(
        "num_rows num_threads num_instructions instructions:p workspace:p row_floats states:p num_state_rows "
        "ids:p slots:p positions:p most_positions vocab_size logits:p lengths:p num_lengths"
    )


_OPERAND = {
    Embed: (Op.EMBED, "embed"),
    Rotation: (Op.ROTATION, "rotation"),
    Matmul: (Op.MATMUL, "matmul"),
    LinearHeads: (Op.LINEAR_HEADS, "linear"),
    AttentionHeads: (Op.ATTENTION_HEADS, "attention"),
    Normalize: (Op.NORMALIZE, "normalize"),
    Copy: (Op.COPY, "copy"),
}


def instruction(operands: Structure) -> Instruction:
    op, name = _OPERAND[type(operands)]
    made = Instruction(op=op)
    setattr(made, name, operands)
    return made


def vector(x: Tensor | None) -> Vector:
    return Vector() if x is None else Vector(x.data_ptr(), DTYPES[x.dtype])


if native.LIBRARY is not None:
    from ctypes import sizeof

    assert native.LIBRARY.constant("glade_instruction_bytes") == sizeof(Instruction), "program.h and records.py differ"
