"""What `glade doctor` says of the decode step."""

import torch

from glade.doctor import decode_path
from glade.infer import native
from glade.infer.lowering import CannotLower

CPU = torch.device("cpu")


def test_the_decode_path_is_named_with_the_reason_where_it_is_torch():
    for weights in ("float32", "bfloat16", "int8"):
        assert decode_path(CPU, weights) == "native"
    assert decode_path(CPU, "float16").startswith("torch: its weights are float16")


def test_a_refusal_is_told_and_not_raised(monkeypatch):
    def refuse(model):
        raise CannotLower("there is no compiler")

    monkeypatch.setattr(native, "lower", refuse)
    assert decode_path(CPU, "float32") == "torch: there is no compiler"
    assert decode_path(CPU, "int8").startswith("refused: int8 weights decode on a CPU by the native program alone")
