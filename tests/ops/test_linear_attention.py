"""Linear attention: every backend against the fp64 token loop, and the properties the contract promises."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glade.errors import BackendError
from glade.ops.linear_attention import (
    available_backends,
    linear_attention,
    linear_attention_step_,
    recomputing,
    register,
)
from glade.ops.linear_attention.parity import (
    CORNERS,
    GATES,
    Corner,
    Shape,
    errors,
    failures,
    make_inputs,
    run_with_gradients,
)
from glade.ops.linear_attention.reference import step

KINDS = ("none", "scalar", "vector")
ALL_CORNERS = [Corner(*kinds) for kinds in itertools.product(KINDS, repeat=3)]
BACKENDS = [name for name in available_backends("cpu") if name != "reference"]


def call(inputs, backend, cu_seqlens=None, **replaced):
    inputs = {**inputs, **replaced}
    q, k, v = inputs.pop("q"), inputs.pop("k"), inputs.pop("v")
    return linear_attention(q, k, v, **inputs, cu_seqlens=cu_seqlens, backend=backend)


def borders(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("corner", CORNERS)
def test_parity(backend, corner, gate, T):
    if CORNERS[corner].g == "none" and gate != "mild":
        pytest.skip("no gate to draw")
    found = errors(make_inputs(CORNERS[corner], Shape(T=T, B=1), gate=gate, seed=T), backend)
    assert not failures(found, torch.float32), found


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["mild", "extreme"])
@pytest.mark.parametrize("corner", ["gla", "gdn", "gdn2"])
def test_parity_over_a_thousand_tokens(backend, corner, gate):
    found = errors(make_inputs(CORNERS[corner], Shape(T=1000, B=1), gate=gate), backend)
    assert not failures(found, torch.float32), found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("corner", ALL_CORNERS, ids="-".join)
def test_every_combination_of_gates(backend, corner):
    cu_seqlens = borders(3, 0, 33, 1, 30)
    inputs = make_inputs(corner, Shape(B=1, T=67), cu_seqlens=cu_seqlens)
    found = errors(inputs, backend, cu_seqlens)
    assert not failures(found, torch.float32), found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("corner", ["linear", "gdn", "gdn2"])
def test_dtypes(backend, dtype, corner):
    if dtype == torch.float64 and backend not in available_backends("cpu", torch.float64):
        pytest.skip(f"{backend} has no fp64")
    inputs = make_inputs(CORNERS[corner], Shape(T=70), dtype=dtype)
    o, state = call(inputs, backend)
    assert o.dtype == dtype and state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = errors(inputs, backend)
    assert not failures(found, dtype), found


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_does_not_round_the_arithmetic(backend):
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=70))
    expected = run_with_gradients(inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(inputs, backend)
        given = {n: x[:, 0] for n, x in inputs.items() if n != "state"}
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
        o = linear_attention_step_(q, k, v, **given, state=inputs["state"].clone(), backend=backend)
    # the reference is plain autograd, whose backward follows the autocast it is called under
    names = ("o", "state") if backend == "reference" else tuple(expected)
    torch.testing.assert_close([found[n] for n in names], [expected[n] for n in names])
    torch.testing.assert_close(o, expected["o"][:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_equal_keys_without_decay(backend):
    """The worst case for the inverse: T is close to all ones below the diagonal."""
    inputs = make_inputs(CORNERS["delta"], Shape(B=1, T=256))
    inputs["k"] = torch.nn.functional.normalize(inputs["k"] * 1e-2 + 1, dim=-1)
    inputs["erase"] = inputs["write"] = torch.ones_like(inputs["erase"])
    found = errors(inputs, backend)
    assert not failures(found, torch.float32), found


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_forgets_everything(backend):
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=70))
    inputs["g"][:, 40] = -float("inf")
    o, state = call(inputs, backend)
    fresh = {name: x if x is None else x[:, 40:] for name, x in inputs.items() if name != "state"}
    fresh["g"] = fresh["g"].clone()
    fresh["g"][:, 0] = 0
    o_fresh, state_fresh = call(fresh, backend, state=None)
    torch.testing.assert_close(o[:, 40:], o_fresh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, state_fresh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("corner", ALL_CORNERS, ids="-".join)
def test_gradcheck(corner):
    cu_seqlens = borders(2, 0, 5)
    inputs = make_inputs(corner, Shape(B=1, T=7, H=1, HV=2, K=3, V=2), dtype=torch.float64, cu_seqlens=cu_seqlens)
    names = [name for name, x in inputs.items() if x is not None]

    def function(*tensors):
        return call({**inputs, **dict(zip(names, tensors, strict=True))}, "torch", cu_seqlens)

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)


def test_reference_is_a_loop_over_step():
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=5, H=4))
    o, state = call(inputs, "reference")
    S = inputs["state"]
    for t in range(5):
        one, S = step(*(inputs[x][:, t] for x in ("q", "k", "v", "g", "erase", "write")), 8**-0.5, S)
        torch.testing.assert_close(o[:, t], one)
    torch.testing.assert_close(state, S)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_reductions_between_corners(backend):
    inputs = make_inputs(CORNERS["kda"], Shape(T=50), gate="mild")
    K, V = inputs["q"].shape[-1], inputs["v"].shape[-1]
    beta = inputs["erase"]
    o, state = call(inputs, backend, write=beta)

    def close(**replaced):
        torch.testing.assert_close(call(inputs, backend, **replaced), (o, state), rtol=1e-5, atol=1e-5)

    widened = beta.unsqueeze(-1)
    close(erase=widened.expand(*beta.shape, K), write=widened.expand(*beta.shape, V))  # GDN-2 with b = w = beta: KDA

    scalar = inputs["g"][..., 0].contiguous()
    o, state = call(inputs, backend, g=scalar, write=beta)
    close(g=scalar.unsqueeze(-1).expand(*scalar.shape, K), write=beta)  # KDA with one decay a head: GDN

    o, state = call(inputs, backend, erase=None, write=None)
    close(erase=torch.zeros_like(beta), write=torch.ones_like(beta))  # nothing erased, all written: GLA

    o, state = call(inputs, backend, g=None, erase=None, write=None)
    close(g=torch.zeros_like(inputs["g"]), erase=None, write=None)  # no decay: linear attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["mild", "extreme"])
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("t", [0, 15, 16, 40])
def test_causal_to_the_bit(backend, corner, gate, t):
    inputs = make_inputs(CORNERS[corner], Shape(T=65), gate=gate)
    other = make_inputs(CORNERS[corner], Shape(T=65), gate="strong", seed=7)
    other["v"] = other["v"] * 1e6  # large, and finite: keys stay unit, so that the recurrence itself stays finite
    changed = {
        name: x if x is None or name == "state" else torch.cat([x[:, : t + 1], other[name][:, t + 1 :]], dim=1)
        for name, x in inputs.items()
    }
    before, after = call(inputs, backend)[0], call(changed, backend)[0]
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("corner", ["linear", "scalar-decay", "gla", "gdn", "gdn2"])
def test_packed_equals_separate(backend, corner):
    lengths = (1, 40, 0, 17, 64)
    cu_seqlens = borders(*lengths)
    inputs = make_inputs(CORNERS[corner], Shape(B=1, T=sum(lengths)), cu_seqlens=cu_seqlens)
    packed = run_with_gradients(inputs, backend, cu_seqlens)
    o, state = call(inputs, backend, cu_seqlens)
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        alone = {n: x if x is None or n == "state" else x[:, start:end] for n, x in inputs.items()}
        o_alone, state_alone = call(alone, backend, state=inputs["state"][i : i + 1])
        torch.testing.assert_close(o[:, start:end], o_alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[i : i + 1], state_alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(state[2], inputs["state"][2])  # an empty document hands its state through
    assert all(x.isfinite().all() for x in packed.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_border(backend):
    cu_seqlens = borders(20, 30)
    inputs = make_inputs(CORNERS["gdn2"], Shape(B=1, T=50), cu_seqlens=cu_seqlens, given_state=False)
    inputs["v"].requires_grad_()
    o, _ = call(inputs, backend, cu_seqlens)
    (dv,) = torch.autograd.grad(o[:, 20:].sum(), inputs["v"])
    assert dv[:, :20].abs().max() == 0 and dv[:, 20:].abs().max() > 0


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("corner", ["gla", "gdn2"])
def test_two_halves_equal_the_whole(backend, corner):
    inputs = make_inputs(CORNERS[corner], Shape(T=70))
    o, state = call(inputs, backend)
    for cut in (1, 32, 45):
        first = {n: x if x is None or n == "state" else x[:, :cut] for n, x in inputs.items()}
        second = {n: x if x is None or n == "state" else x[:, cut:] for n, x in inputs.items()}
        o1, middle = call(first, backend)
        o2, end = call(second, backend, state=middle)
        torch.testing.assert_close(torch.cat([o1, o2], 1), o, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_keeps_the_inputs_only_and_gives_the_same_bits(backend, compiled):
    inputs = make_inputs(CORNERS["gdn2"], Shape(B=1, T=40), cu_seqlens=borders(7, 33))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def loss(x):
        o, state = call(x, backend, borders(7, 33))
        return o.sum() + state.sum()

    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    saved, results = [], []
    for on in (False, True):
        sizes = []
        with (
            recomputing(on),
            torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x),
        ):
            y = loss(leaves)
        saved.append(sum(sizes))
        results.append(torch.autograd.grad(y, list(leaves.values())))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    if not compiled:
        assert saved[1] == sum(x.nbytes for x in inputs.values()) + borders(7, 33).nbytes < saved[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 8), (2, 6), (3, 3)], ids=str)
@pytest.mark.parametrize("corner", ["gdn2", "gdn", "gla", "linear"])
def test_recomputing_by_groups_of_heads(corner, heads, compiled, monkeypatch):
    monkeypatch.setattr(register, "MANY_BYTES", 0)
    inputs = make_inputs(CORNERS[corner], Shape(2, 40, *heads, 8, 6), dtype=torch.float64)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if x is not None}

    def loss(x):
        o, state = call({**inputs, **x}, "torch")
        return (o * torch.linspace(0, 1, o.numel(), dtype=o.dtype).view_as(o)).sum() + state.square().sum()

    if compiled:
        torch.compiler.reset()  # more variants than it lets one function have
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for on in (False, True):
        with recomputing(on):
            y = loss(leaves)
        results.append(torch.autograd.grad(y, list(leaves.values())))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_tokens_and_no_documents(backend):
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=0))
    o, state = call(inputs, backend)
    assert o.shape == (2, 0, 4, 6) and torch.equal(state, inputs["state"])
    assert state.data_ptr() != inputs["state"].data_ptr()
    inputs = make_inputs(CORNERS["gdn2"], Shape(B=1, T=0), cu_seqlens=borders())
    o, state = call(inputs, backend, borders())
    assert o.shape == (1, 0, 4, 6) and state.shape == (0, 4, 8, 6)
    inputs = make_inputs(CORNERS["gdn2"], Shape(B=1, T=0), cu_seqlens=borders(0, 0))
    assert torch.equal(call(inputs, backend, borders(0, 0))[1], inputs["state"])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("corner", ALL_CORNERS, ids="-".join)
def test_step_equals_one_token(backend, corner):
    inputs = make_inputs(corner, Shape(B=3, T=1))
    o, state = call(inputs, "reference")
    given = {n: x if x is None else x[:, 0] for n, x in inputs.items() if n != "state"}
    q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
    stepped = inputs["state"].clone()
    torch.testing.assert_close(linear_attention_step_(q, k, v, **given, state=stepped, backend=backend), o[:, 0])
    torch.testing.assert_close(stepped, state)

    slots = torch.tensor([4, 0, 2])
    table = torch.randn(5, *state.shape[1:])
    table[slots] = inputs["state"]
    untouched = table[[1, 3]].clone()
    linear_attention_step_(q, k, v, **given, state=table, slots=slots, backend=backend)
    torch.testing.assert_close(table[slots], state)
    assert torch.equal(table[[1, 3]], untouched)


def test_broadcast_inputs_and_their_gradients():
    inputs = make_inputs(CORNERS["gdn2"], Shape())
    per_head = torch.tensor([-0.1, -0.2, -0.3, -0.4], requires_grad=True)
    g = per_head[None, None, :, None].expand(2, 64, 4, 8)
    for backend in ["reference", *BACKENDS]:
        o, _ = call(inputs, backend, g=g)
        (grad,) = torch.autograd.grad(o.sum(), per_head)
        if backend == "reference":
            expected, expected_grad = o.detach(), grad
        torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs(CORNERS["gdn2"], Shape(T=40))
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    compiled = torch.compile(lambda x: call(x, backend), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda x: call(x, backend)):
        o, state = function(leaves)
        results.append((o, state, *torch.autograd.grad(o.sum() + state.sum(), list(leaves.values()))))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
def test_the_custom_op_is_registered_rightly_and_gives_what_the_eager_call_gives(backend):
    inputs = {n: x.requires_grad_() for n, x in make_inputs(CORNERS["gdn2"], Shape(T=40)).items()}
    op = getattr(torch.ops.glade, f"linear_attention_{backend}").default
    arguments = [inputs.get(name) for name in ("q", "k", "v", "g", "erase", "write")]
    arguments += [inputs["q"].shape[-1] ** -0.5, inputs["state"], None, True]
    torch.library.opcheck(op, arguments)
    results = []
    for o, state, *_ in (op(*arguments), call(inputs, backend)):
        results.append((o, state, *torch.autograd.grad(o.sum(), list(inputs.values()))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_packed_documents(backend):
    compiled = torch.compile(lambda x, cu: call(x, backend, cu), fullgraph=True, backend="aot_eager")
    for lengths in ((10, 30), (1, 2, 37)):
        cu_seqlens = borders(*lengths)
        inputs = make_inputs(CORNERS["kda"], Shape(B=1, T=40), cu_seqlens=cu_seqlens)
        inputs["q"].requires_grad_()
        o, state = compiled(inputs, cu_seqlens)
        torch.testing.assert_close((o, state), call(inputs, backend, cu_seqlens))
        (o.sum() + state.sum()).backward()


# With one key channel k is 1 or -1, and erase takes all of a state away in some tokens: the gradient of the state is
# then what is left of large terms that cancel, and no measure for them.
@settings(max_examples=40, deadline=None)
@example(
    corner=ALL_CORNERS[-1], gate="mild", lengths=[5, 0, 1], heads=(1, 3), dims=(1, 1), given_state=True, seed=1,
    backend=BACKENDS[0],
)  # fmt: skip
@given(
    corner=st.sampled_from(ALL_CORNERS),
    gate=st.sampled_from(GATES),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 4)]),
    dims=st.tuples(st.integers(2, 9), st.integers(1, 9)),
    given_state=st.booleans(),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from(BACKENDS),
)
def test_any_call_agrees_with_the_reference(corner, gate, lengths, heads, dims, given_state, seed, backend):
    cu_seqlens = borders(*lengths)
    shape = Shape(1, sum(lengths), *heads, *dims)
    inputs = make_inputs(corner, shape, gate=gate, cu_seqlens=cu_seqlens, given_state=given_state, seed=seed)
    found = errors(inputs, backend, cu_seqlens)
    assert not failures(found, torch.float32), found


def test_reference_refuses_growth():
    inputs = make_inputs(CORNERS["gla"], Shape())
    inputs["g"][0, 3, 1, 2] = 0.25
    with pytest.raises(ValueError, match=r"g reaches 0\.25.*<= 0"):
        call(inputs, "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=torch.zeros(2, 64, 3, 6)), r"v has 3 heads, not a multiple of q's 2 \(HV % H must be 0\)"),
        (dict(k=torch.zeros(2, 64, 2, 9)), r"k has shape \[2, 64, 2, 9\] and q \[2, 64, 2, 8\]"),
        (dict(v=torch.zeros(2, 63, 4, 6)), r"v begins with \[2, 63\] and q with \[2, 64\]"),
        (dict(g=torch.zeros(2, 64, 4, 6)), r"g has shape \[2, 64, 4, 6\]; give \[2, 64, 4\].*or \[2, 64, 4, 8\]"),
        (dict(g=torch.zeros(2, 64, 4, dtype=torch.int64)), r"g is torch\.int64; give a floating dtype"),
        (dict(write=torch.zeros(2, 64, 4, 8)), r"write has shape \[2, 64, 4, 8\]"),
        (dict(state=torch.zeros(2, 4, 6, 8)), r"state has shape \[2, 4, 6, 8\]; it must be \[2, 4, 8, 6\]"),
        (dict(state=torch.zeros(2, 4, 8, 6, dtype=torch.bfloat16)), r"state is torch\.bfloat16"),
        (dict(q=torch.zeros(2, 64, 2, 8, dtype=torch.bfloat16)), r"must share one dtype"),
        (dict(q=torch.zeros(2, 64, 8)), r"q has shape \[2, 64, 8\]; it must have 4 axes"),
    ],
)
def test_wrong_calls_name_the_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        call(make_inputs(CORNERS["gdn2"], Shape()), "auto", **change)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (borders(10, 20), r"runs from 0 to 30; it must run from 0 to T = 64"),
        (torch.tensor([0, 40, 30, 64]), r"falls from 40 to 30 at document 1"),
        (torch.tensor([0.0, 64.0]), r"give int32 or int64"),
    ],
)
def test_wrong_cu_seqlens(backend, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        call(make_inputs(CORNERS["gla"], Shape(B=1), given_state=False), backend, cu_seqlens)


def test_packing_needs_one_row():
    with pytest.raises(ValueError, match="the batch is 2"):
        call(make_inputs(CORNERS["gla"], Shape(), given_state=False), "auto", borders(64))


def test_unknown_and_unable_backends_name_one_that_can():
    with pytest.raises(BackendError, match=r"'cuda' is not installed here.*torch"):
        call(make_inputs(CORNERS["gla"], Shape()), "cuda")
    assert available_backends("cpu")[0] == BACKENDS[0]
