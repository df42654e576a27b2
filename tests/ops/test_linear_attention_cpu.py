"""The `cpu` backend beyond what every backend is held to: strides, dims, builds, threads, forks, and its absence."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

from glade.errors import BackendError
from glade.ops import native
from glade.ops.linear_attention import dispatch, linear_attention, linear_attention_step_
from glade.ops.linear_attention.cpu import op
from glade.ops.linear_attention.parity import CORNERS, Shape, errors, failures, make_inputs, run_with_gradients

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason=f"the kernel {native.ABSENCE}")

ISAS = [] if native.LIBRARY is None else native.LIBRARY.isas
BORDERS = torch.tensor([0, 5, 5, 86, 100, 133], dtype=torch.int32)


def call(inputs, **replaced):
    return linear_attention(**{**inputs, **replaced}, backend="cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", native.Library(isa=request.param))
    return request.param


@pytest.mark.parametrize("dims", [(1, 1), (3, 17), (17, 3), (33, 100), (100, 33), (64, 64), (256, 100), (300, 256)])
@pytest.mark.parametrize("corner", ["linear", "gla", "gdn", "gdn2"])
def test_every_build_at_any_dims(isa, corner, dims):
    inputs = make_inputs(CORNERS[corner], Shape(1, 133, 1, 2, *dims), cu_seqlens=BORDERS)
    found = errors(inputs, "cpu", BORDERS)
    assert not failures(found, torch.float32), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("corner", ["scalar-decay", "kda", "gdn2"])
def test_every_build_in_both_precisions(isa, corner, dtype):
    inputs = make_inputs(CORNERS[corner], Shape(T=70, K=40, V=24), dtype=dtype, gate="extreme")
    found = errors(inputs, "cpu")
    assert not failures(found, dtype), found


@pytest.mark.parametrize("dims", [(33, 100), (64, 64)])
@pytest.mark.parametrize("corner", ["linear", "delta", "kda", "gdn2"])
def test_every_build_in_bf16_over_many_chunks(isa, corner, dims):
    inputs = make_inputs(CORNERS[corner], Shape(1, 150, 1, 2, *dims), dtype=torch.bfloat16, gate="strong")
    found = errors(inputs, "cpu")
    assert not failures(found, torch.bfloat16), found


@pytest.mark.parametrize("corner", CORNERS)
def test_strided_inputs_are_read_in_place(corner):
    inputs = make_inputs(CORNERS[corner], Shape(T=50, K=24, V=40))
    expected = run_with_gradients(inputs, "cpu")

    def strided(x):  # every second channel pair, heads and tokens swapped in memory
        wide = torch.full((x.shape[0], x.shape[2], x.shape[1], 2 * (x.shape[3] if x.dim() == 4 else 1)), float("nan"))
        view = wide.transpose(1, 2)[..., : wide.shape[-1] // 2]
        view = view if x.dim() == 4 else view[..., 0]
        return view.copy_(x)

    apart = {name: x if x is None or name == "state" else strided(x) for name, x in inputs.items()}
    apart["state"] = inputs["state"].transpose(2, 3).contiguous().transpose(2, 3)
    o, state = call(apart)
    assert torch.equal(o, expected["o"]) and torch.equal(state, expected["state"])
    # channels that are not neighbours
    apart = {n: x if x is None or x.dim() < 4 or n == "state" else x.repeat_interleave(2, -1)[..., ::2]
             for n, x in inputs.items()}  # fmt: skip
    assert torch.equal(call(apart)[0], expected["o"])


def test_broadcast_inputs():
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=50, K=24, V=40))
    wide = {
        "q": inputs["q"][:, :1],
        "k": inputs["k"][:1],
        "v": inputs["v"][:, :, :1],
        "g": inputs["g"][..., :1],
        "erase": inputs["erase"][:1, :1, :1],
        "write": inputs["write"][..., :1],
    }
    wide = {name: x.expand(inputs[name].shape) for name, x in wide.items()}
    whole = {name: x.contiguous() for name, x in wide.items()}
    o, state = call(inputs, **wide)
    expected, expected_state = call(inputs, **whole)
    assert torch.equal(o, expected) and torch.equal(state, expected_state)
    found = errors({**inputs, **wide}, "cpu")
    assert not failures(found, torch.float32), found


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gates_have_a_dtype_of_their_own(gate_dtype):
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=50), gate_dtype=gate_dtype)
    found = errors(inputs, "cpu")
    limit = torch.float32 if gate_dtype == torch.float64 else gate_dtype
    assert not failures(found, limit), found


def test_many_documents():
    lengths = torch.randint(0, 90, (60,), generator=torch.Generator().manual_seed(3))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    inputs = make_inputs(CORNERS["gdn"], Shape(1, int(cu_seqlens[-1]), 1, 2), cu_seqlens=cu_seqlens)
    found = errors(inputs, "cpu", cu_seqlens)
    assert not failures(found, torch.float32), found


@pytest.mark.parametrize("corner", ["gla", "gdn", "gdn2"])
@pytest.mark.parametrize("shape", [Shape(3, 300, 2, 4, 64, 64), Shape(1, 700, 1, 1, 64, 256)])
def test_threads_change_no_bit(corner, shape, threads):
    inputs = make_inputs(CORNERS[corner], shape)
    threads(1)
    expected = run_with_gradients(inputs, "cpu")
    for num in (2, 3):
        threads(num)
        found = run_with_gradients(inputs, "cpu")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    inputs = make_inputs(CORNERS["gdn"], Shape(4, 200, 2, 4, 64, 64))
    expected = call(inputs)[0]
    found: list[torch.Tensor] = []

    def calls():
        found.extend(call(inputs)[0] for _ in range(5))

    callers = [threading.Thread(target=calls) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 15 and all(torch.equal(x, expected) for x in found)


def test_a_forked_child_starts_its_own_threads(threads):
    threads(2)
    inputs = make_inputs(CORNERS["gdn"], Shape(4, 200, 2, 4, 64, 64))
    expected = call(inputs)[0]
    child = os.fork()
    if child == 0:
        # torch's OpenMP does not survive a fork, so nothing of torch may run in parallel here
        signal.alarm(60)
        torch.utils.deterministic.fill_uninitialized_memory = False
        o = op.forward(
            *(inputs[x] for x in ("q", "k", "v", "g", "erase", "write")), 0.125, inputs["state"], None, False
        )
        os._exit(0 if bytes(o[0].untyped_storage()) == bytes(expected.untyped_storage()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_comes_later_may_be_inf_or_nan():
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=40, K=24, V=40))
    expected = call(inputs)[0]
    for name in ("q", "k", "v", "g", "erase", "write"):
        for value in (float("nan"), float("inf")):
            broken = inputs[name].clone()
            broken[:, 21:] = -value if name == "g" else value
            assert torch.equal(call(inputs, **{name: broken})[0][:, :21], expected[:, :21]), (name, value)


def test_exponential():
    """Decays of one token each: the state is exp g, to 2 units in the last place; exactly 0 far below."""
    g = torch.cat([-torch.logspace(-8, 2.01, 4000), torch.tensor([0.0, -87.3, -104.1, -1e4, -float("inf")])])
    one = torch.ones(1, 1, 1, len(g))
    state = torch.ones(1, 1, len(g), 1)
    zero = torch.zeros_like(one)
    _, found = linear_attention(one, zero, one[..., :1], g=g.view(1, 1, 1, -1), state=state, backend="cpu")
    exact = g.double().exp()
    normal = exact > 1.2e-38
    ulp = torch.finfo(torch.float32).eps
    assert ((found.flatten().double() - exact).abs() <= 2 * ulp * exact)[normal].all()
    assert (found.flatten()[g < -104] == 0).all() and found.flatten()[len(g) - 5] == 1


def test_step_on_strided_states_and_wrong_slots(isa):
    inputs = make_inputs(CORNERS["gdn2"], Shape(3, 1, 2, 4, 20, 37))
    given = {name: x[:, 0] for name, x in inputs.items() if name != "state"}
    expected, state = call(inputs)
    for room in (
        torch.empty(3, 8, 20, 37)[:, ::2],
        torch.empty(3, 4, 37, 20).transpose(2, 3),
        torch.empty(6, 4, 20, 37)[::2],
    ):
        room.copy_(inputs["state"])
        o = linear_attention_step_(**given, state=room, backend="cpu")
        torch.testing.assert_close(o, expected[:, 0])
        torch.testing.assert_close(room, state)
    with pytest.raises(ValueError, match="slots name a row that the state does not have"):
        linear_attention_step_(**given, state=inputs["state"], slots=torch.tensor([0, 1, 3]), backend="cpu")


def test_refusals_name_torch():
    x = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"'cpu' computes in fp32.*'torch'"):
        linear_attention(x, x, x, backend="cpu")
    with pytest.raises(BackendError, match=r"'cpu' needs tensors on the CPU"):
        dispatch.backend_for("cpu", torch.device("cuda"), torch.float32)


def test_unknown_builds_and_missing_libraries(tmp_path):
    with pytest.raises(ValueError, match=r"isa is 'sse9'.*this processor runs"):
        native.Library(isa="sse9")
    with pytest.raises(OSError):
        native.Library(tmp_path / "libglade_cpu.so")


def test_the_library_needs_nothing_but_the_c_library():
    """No second OpenMP, nothing of torch's or Python's: so one file serves every machine with a C library."""
    needed = set(re.findall(rb"(?<=\0)(?:lib|ld-)[\w+.-]*?\.so(?:\.\d+)*(?=\0)", native.PATH.read_bytes()))
    assert needed and {name.split(b".so")[0] for name in needed} <= {b"libc", b"libm", b"libpthread"}, needed


WITHOUT = """
import sys, torch
from glade.ops.linear_attention import available_backends, linear_attention
assert available_backends()[0] == "torch", available_backends()
x = torch.ones(1, 2, 1, 4)
for _ in range(2):
    linear_attention(x, x, x)
linear_attention(x.double(), x.double(), x.double())
try:
    linear_attention(x, x, x, backend="cpu")
except ValueError as error:
    print(error)
"""


def test_without_the_library_torch_serves_and_says_so_once():
    script = f"""
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **options: self.name != "libglade_cpu.so" and exists(self, **options)
{WITHOUT}"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("backend 'cpu' of linear_attention was not built") == 1, done.stderr
    assert "Use 'torch'" in done.stdout
