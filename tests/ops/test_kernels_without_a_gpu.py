"""The kernels of linear attention on a machine without a GPU: interpreted, and compiled for Hopper.

The interpreter lets pass what the compiler does not: a name that is a number known at compile time first and a tensor
in a loop, a value whose type a loop changes, a layout that cannot be made.
"""

import itertools

import pytest
import torch

from glade.ops.linear_attention import dispatch, linear_attention, linear_attention_step_
from glade.ops.linear_attention.parity import CORNERS, Corner, Shape, errors, failures, make_inputs
from glade.ops.linear_attention.register import register

USUAL = Shape(2, 130, 2, 4, 128, 64)
SHORT = Shape(1, 17, 2, 2, 24, 40)
DOCUMENTS = Shape(1, 300, 2, 4, 128, 128)
LONG = Shape(1, 4099, 1, 2, 64, 64)  # in segments
WHOLE = Shape(16, 128, 2, 8, 64, 128)  # whole spans in programs enough: for the kernels in Gluon, on sm_90


def borders(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.slow
def test_the_kernels_compile(without_a_gpu):
    without_a_gpu(compile_kernels)


def hopper():
    from triton.backends.compiler import GPUTarget

    class Hopper:
        """As much of Triton's driver as a compile asks for."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    return Hopper()


def compile_kernels():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from glade.ops.linear_attention.triton.assembler import choose_assembler
    from glade.ops.linear_attention.triton.op import backward, forward

    compiled, waiting, shared_bytes = [], {}, {}

    def compile_only(kernel, *args, grid, warmup, **named):
        if "INTERPRETED" in named:
            named["INTERPRETED"] = False
        made = launch(kernel, *args, grid=grid, warmup=True, **named)
        assert made.asm["cubin"], kernel
        compiled.append(kernel)
        name = kernel.fn.__name__
        waiting[name] = loads_in_loops_that_copy_ahead(made.asm["ttgir"])
        shared_bytes[name] = made.metadata.shared

    driver.set_active(hopper())
    choose_assembler()
    launch, JITFunction.run = JITFunction.run, compile_only

    def check(corner, shape, dtype=torch.bfloat16, lengths=None, given_state=True):
        cu_seqlens = None if lengths is None else borders(*lengths)
        x = make_inputs(corner, shape, dtype=dtype, cu_seqlens=cu_seqlens, given_state=given_state)
        call = (*(x[name] for name in ("q", "k", "v", "g", "erase", "write")), 1.0, x["state"], cu_seqlens)
        before = len(compiled)
        o, final, *kept = forward(*call, True)
        backward(torch.empty_like(o), torch.zeros_like(final), *call, kept)
        assert len(compiled) >= before + 3, (corner, shape)

    for name in ("linear", "gla", "delta", "gdn", "kda", "gdn2"):
        check(CORNERS[name], USUAL)
        assert not any(waiting.values()), (name, waiting)
    for name in ("gla", "gdn", "gdn2"):
        check(CORNERS[name], SHORT, given_state=False)
        check(CORNERS[name], LONG)
    passes = [f"{path}{way}_states_kernel" for path in ("scalar_", "") for way in ("forward", "backward")]
    for name in ("gdn", "gdn2"):
        check(CORNERS[name], DOCUMENTS._replace(B=5))
        of_rows = {x: shared_bytes[x] for x in passes}
        check(CORNERS[name], DOCUMENTS, lengths=(3, 0, 137, 1, 159))
        # as many copies are on their way as where rows are sequences; those of whole tiles have a few words beside them
        assert all(abs(of_rows[x] - shared_bytes[x]) < 512 for x in passes), (name, of_rows, shared_bytes)
    check(Corner("scalar", "vector", "none"), USUAL)  # a kernel of its own for its keys
    check(CORNERS["gdn2"], USUAL, torch.float32)
    compile_kernels_in_gluon(check, shared_bytes)


def has_gluon(x):
    """As it is known here: of the versions that the kernels compile with, a GPU has seen the first."""
    import triton

    return triton.__version__.startswith(("3.6.", "3.7."))


def compile_kernels_in_gluon(check, shared_bytes):
    from glade.ops.linear_attention.triton.hopper import launches

    scalar = {f"hopper_scalar_{name}_kernel" for name in ("forward", "backward", "keys")}
    passes = {f"hopper_vector_{name}_kernel" for name in ("forward", "backward")}
    by_chunks = passes | {"hopper_vector_prepare_kernel"}
    vector, gated = by_chunks | {"hopper_vector_keys_kernel"}, by_chunks | {"hopper_vector_span_keys_kernel"}
    launches.on_sm_90 = has_gluon
    if not has_gluon(None):
        return
    for corner, kernels in (
        (CORNERS["gdn"], scalar),
        (CORNERS["delta"], scalar),
        (Corner("scalar", "scalar", "none"), scalar),
        (CORNERS["scalar-decay"], scalar),
        (CORNERS["linear"], scalar),
        (CORNERS["gla"], gated),
        (CORNERS["kda"], vector),
        (CORNERS["gdn2"], vector),
    ):
        for shape in (WHOLE, WHOLE._replace(K=128), WHOLE._replace(B=32, V=64)):
            shared_bytes.clear()
            check(corner, shape, given_state=corner.g != "vector")
            assert kernels <= shared_bytes.keys(), (corner, shape, shared_bytes.keys())
            # two programs share a processor, which keeps 1 KB of each to itself; later versions of Triton take more
            room = 114 if launches.AVAILABLE else 228
            assert all(shared_bytes[name] + 1024 <= room * 1024 for name in kernels - passes), shared_bytes


def test_which_calls_are_for_the_kernels_in_gluon(without_a_gpu):
    without_a_gpu(ask_which_calls)


def ask_which_calls():
    from glade.ops.linear_attention.triton.call import Call
    from glade.ops.linear_attention.triton.hopper import launches

    launches.on_sm_90 = has_gluon
    if not has_gluon(None):
        return

    def served(
        corner, shape=WHOLE, dtype=torch.bfloat16, cu_seqlens=None, block=launches.VALUES, carried=None, span=0, **given
    ):
        """By which kernels, with chunks in spans of another length than usual if `span` is one."""
        x = make_inputs(corner, shape, dtype=dtype, cu_seqlens=cu_seqlens) | given
        call = Call(x["q"], x["v"], x["g"], x["erase"], x["write"], cu_seqlens)
        call.span = span or call.span
        q, k, v, g, erase, write = (x[name] for name in ("q", "k", "v", "g", "erase", "write"))
        rows = torch.empty_like(v, memory_format=torch.contiguous_format)
        asked = {
            "keys": launches.serves_scalar_keys(call, q, k, v),
            "states": launches.serves_scalar_states(call, block, q, k, v),
            "vector prepare": launches.serves_vector_prepare(call, q, k, g, erase, write),
            "vector states": launches.serves_vector_states(call, block, v, write if call.write == 2 else None),
            "vector keys": launches.serves_vector_keys(call, carried, q, k, g, erase, rows, rows),
        }
        return {name for name, yes in asked.items() if yes}

    gdn, gla, kda, gdn2 = (CORNERS[name] for name in ("gdn", "gla", "kda", "gdn2"))
    scalar, vector = {"keys", "states"}, {"vector prepare", "vector states", "vector keys"}
    for corner in (gdn, *(CORNERS[x] for x in ("delta", "scalar-decay", "linear")), Corner("scalar", "scalar", "none")):
        assert served(corner) == scalar, corner
    for corner in (gla, kda, gdn2):
        assert served(corner) == vector, corner
        assert served(corner, block=32) == vector - {"vector states"}
        assert served(corner, carried=torch.zeros(1)) == vector - {"vector keys"}
    for corner, span in ((gdn, 1), (gla, 1), (kda, 2), (gdn2, 2)):
        assert served(corner, span=span) == served(corner) - {"keys", "states", "vector keys"}, corner
    others = ("scalar", "scalar", "vector"), ("none", "vector", "none"), ("scalar", "none", "scalar")
    for corner in (Corner(*kinds) for kinds in others):
        assert not served(corner), corner
    assert served(gdn, block=32) == {"keys"}
    for other in ({"T": 100}, {"T": 96}, {"K": 96}, {"K": 256}, {"V": 96}, {"V": 256}, {"B": 0}):
        assert not served(gdn, WHOLE._replace(**other)), other
        assert not served(gla, WHOLE._replace(**other)), other
    for other in ({"T": 100}, {"K": 96}, {"K": 256}, {"V": 96}, {"V": 256}, {"B": 0}):
        assert not served(kda, WHOLE._replace(**other)), other
    packed = WHOLE._replace(B=1)
    for corner in (gdn, gla, kda):
        assert not served(corner, packed, cu_seqlens=borders(64, 64))
        for dtype in (torch.float16, torch.float32):
            assert not served(corner, dtype=dtype)
    x = make_inputs(gdn, WHOLE, dtype=torch.bfloat16)

    def elsewhere(x):
        unaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)
        by_heads = x.transpose(1, 2).contiguous().transpose(1, 2)
        same_for_all = x[:, :1].expand_as(x)
        return unaligned, by_heads, same_for_all

    for corner, by_v in ((gdn, scalar), (kda, {"vector states"})):
        joint = torch.cat([x["v"], x["v"]], 2)
        assert served(corner, v=joint[:, :, : x["v"].shape[2]]) == served(corner)  # a slice lies by tokens
        for v in elsewhere(x["v"]):
            assert served(corner, v=v) == served(corner) - by_v, v.stride()
    for name in ("q", "k"):
        for keys in elsewhere(x[name]):
            assert served(kda, **{name: keys}) == {"vector states"}, (name, keys.stride())
    for name, corner in (("g", gla), ("erase", gdn2)):
        for gate in elsewhere(make_inputs(corner, WHOLE, dtype=torch.bfloat16)[name]):
            assert served(corner, **{name: gate}) == {"vector states"}, (name, gate.stride())
    assert served(gdn2, write=elsewhere(x["v"])[1]) == vector - {"vector states"}
    rows = make_inputs(kda, WHOLE, dtype=torch.bfloat16)["erase"]
    assert served(kda, erase=torch.cat([rows, rows], 1)[:, : rows.shape[1]]) == {
        "vector states"
    }  # not one behind another
    assert served(kda, write=torch.cat([rows, rows], 1)[:, : rows.shape[1]]) == vector - {"vector prepare"}


def test_launches_of_a_kind_are_what_triton_makes_of_them(without_a_gpu):
    without_a_gpu(launch_again)


def launch_again():
    """The second call of a kind launches the same kernels with the same arguments, by way of `start` alone; one whose v
    begins elsewhere is another kind. Nothing runs."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from glade.ops.linear_attention.triton.assembler import choose_assembler
    from glade.ops.linear_attention.triton.hopper import launches
    from glade.ops.linear_attention.triton.op import backward, forward

    by_triton, launched = [], []
    launches.on_sm_90 = has_gluon

    def run(kernel, *args, **named):
        by_triton.append(kernel.fn.__name__)
        return run_of_triton(kernel, *args, **named)

    def have_handles(kernel):
        kernel.function = 0

        def note(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            launched.append((kernel, (x, y, z), args))

        kernel._run = note

    driver.set_active(hopper())
    choose_assembler()
    CompiledKernel._init_handles = have_handles
    run_of_triton, JITFunction.run = JITFunction.run, run

    def call(corner, shape, lengths=None, first=0):
        launched.clear()
        by_triton.clear()
        cu_seqlens = None if lengths is None else borders(*lengths)
        x = make_inputs(corner, shape, dtype=torch.bfloat16, cu_seqlens=cu_seqlens)
        elsewhere = torch.empty(x["v"].numel() + first, dtype=torch.bfloat16)[first:].view_as(x["v"])
        inputs = (x["q"], torch.nn.Parameter(x["k"]), elsewhere, x["g"], x["erase"], x["write"])
        o, final, *kept = forward(*inputs, 1.0, x["state"], cu_seqlens, True)
        backward(torch.empty_like(o), torch.zeros_like(final), *inputs, 1.0, x["state"], cu_seqlens, kept)
        return list(launched), list(by_triton)

    def like(x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.shape, x.stride()
        return [like(y) for y in x] if isinstance(x, tuple) else getattr(x, "value", getattr(x, "block_shape", x))

    with torch.no_grad():
        for name, shape, lengths in (
            ("gdn", USUAL, None),
            ("kda", USUAL, None),
            ("gdn2", LONG, None),
            ("gdn", DOCUMENTS, (3, 0, 137, 1, 159)),
            ("gdn", WHOLE, None),
            ("gdn2", WHOLE, None),
        ):
            first, through_triton = call(CORNERS[name], shape, lengths)
            assert 4 <= len(through_triton) <= len(first)  # a call may launch a kind twice
            again, through_triton = call(CORNERS[name], shape, lengths)
            assert not through_triton
            assert [x[:2] for x in again] == [x[:2] for x in first]
            for (_, _, args), (_, _, before) in zip(again, first, strict=True):
                assert [like(x) for x in args] == [like(x) for x in before]
            other, through_triton = call(CORNERS[name], shape, lengths, first=1)
            assert through_triton
            assert [x[0] for x in other] != [x[0] for x in first]


def loads_in_loops_that_copy_ahead(ttgir):
    """Tensors that a loop over chunks asks for when it needs them: Triton makes no copy ahead of a load whose elements
    it thinks too small, and carries it in registers, where it is waited for in every trip."""
    loads, loops = [], []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and line.strip().startswith("}") and indent == loops[-1][0]:
            _, body = loops.pop()
            if any("async_copy" in x or "async_tma_copy" in x for x in body):
                loads += [x for x in body if "tt.load" in x and "tensor<" in x]
        for _, body in loops:
            body.append(line)
        if "scf.for" in line:
            loops.append((indent, []))
    return loads


@pytest.mark.slow
def test_the_kernels_in_the_interpreter(interpret):
    interpret(in_the_interpreter)


def in_the_interpreter():
    """All kernels, in fp32 and fp16, since the interpreter multiplies bf16 as bits."""
    from glade.ops.linear_attention.triton import configs

    register_interpreted()
    shape, packed = Shape(B=1, T=70, H=1, HV=2, K=24, V=20), Shape(1, 41, 1, 1)
    cu_seqlens = borders(3, 0, 37, 1)
    for name, corner in CORNERS.items():
        for gate in ("mild", "extreme") if name in ("gdn", "gdn2") else ("mild",):
            check_interpreted(corner, shape, gate=gate)
    for corner in (Corner("scalar", "vector", "none"), Corner("scalar", "scalar", "vector")):
        check_interpreted(corner, packed, cu_seqlens)
    check_interpreted(CORNERS["kda"], Shape(1, 33, 1, 1), dtype=torch.float16)
    check_whole_tiles()
    check_inverse()
    check_interpreted_step()
    check_gradients_of_outputs_alone()
    # states kept at every second chunk only
    nearest = configs.nearest
    configs.nearest = lambda *key: nearest(*key)._replace(chunk=16, span=2)
    check_interpreted(CORNERS["gdn"], shape._replace(T=49))
    check_interpreted(CORNERS["linear"], shape)
    check_interpreted(CORNERS["gdn"], packed, cu_seqlens)
    for name in ("gla", "gdn2"):
        check_interpreted(CORNERS[name], shape._replace(T=49))
        check_interpreted(CORNERS[name], packed, cu_seqlens, gate="extreme")
    check_interpreted(Corner("vector", "scalar", "none"), shape._replace(T=15))
    check_interpreted(Corner("scalar", "vector", "none"), shape)  # whose keys take single chunks
    configs.nearest = lambda *key: nearest(*key)._replace(chunk=32, span=2)
    check_interpreted(CORNERS["gla"], shape)
    check_interpreted(CORNERS["kda"], shape._replace(T=135), gate="saturated")
    check_interpreted(CORNERS["gdn2"], packed, cu_seqlens, dtype=torch.float16)
    wide = configs.WIDE
    configs.WIDE = wide._replace(sum_dtype=torch.float32)  # sums of logs as products, as bf16 has them
    for name in ("gla", "gdn2"):
        check_interpreted(CORNERS[name], shape)
    configs.WIDE = wide
    configs.nearest = lambda *key: nearest(*key)._replace(chunk=16, span=2)
    check_segments()
    check_chunks_that_matter()
    check_gradients_beside_each_other()
    check_recomputed_gradients_lie_where_they_belong()


def check_gradients_of_outputs_alone():
    """Where nothing follows from the final state, its gradient is None and not zeros."""
    for kernels, name in (("scalar", "gdn"), ("op", "gdn2")):
        given = make_inputs(CORNERS[name], Shape(1, 37, 1, 2, 24, 20))
        inputs = {n: x.requires_grad_() for n, x in given.items() if x is not None}
        gradients = []
        for backend in ("reference", kernels):
            o = linear_attention(**inputs, backend=backend)[0]
            loss = (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum()
            gradients.append(torch.autograd.grad(loss, list(inputs.values())))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def check_gradients_beside_each_other():
    """q, k and v as slices of one tensor, whose gradient the kernels write as it lies."""
    from glade.ops import parts

    parts.serves = lambda x: x.requires_grad
    same_place, places = parts.same_place, []
    parts.same_place = lambda x, y: places.append(same_place(x, y)) or places[-1]
    cu_seqlens = borders(3, 0, 37, 1)
    cases = [("scalar", "gdn", None), ("scalar", "linear", cu_seqlens), ("op", "gdn2", None), ("op", "gla", cu_seqlens)]
    for backend, corner, packed in cases:
        shape = Shape(1 if packed is not None else 2, 41, 2, 2, 24, 40)
        inputs = make_inputs(CORNERS[corner], shape, cu_seqlens=packed)
        slices = [inputs.pop(name) for name in "qkv"]
        joint = torch.cat([x.flatten(-2) for x in slices], -1).requires_grad_()
        gradients = []
        for cut in (parts.split, lambda x, sizes: x.split(sizes, -1)):
            q, k, v = (x.unflatten(-1, (2, -1)) for x in cut(joint * 1, [x.flatten(-2).shape[-1] for x in slices]))
            o, state = linear_attention(q, k, v, **inputs, cu_seqlens=packed, backend=backend)
            loss = (o * torch.linspace(0, 1, o.numel()).view_as(o)).sum() + state.sum()
            gradients += torch.autograd.grad(loss, joint)
        assert torch.equal(*gradients), corner
    assert len(places) == 3 * len(cases) and all(places)


def check_recomputed_gradients_lie_where_they_belong():
    """Recomputing for a fourth of the heads at a time, the kernels write into the gradients of all heads."""
    from glade.ops.linear_attention import recomputing
    from glade.ops.linear_attention import register as rule

    rule.MANY_BYTES = 0
    same_place, cu_seqlens = rule.same_place, borders(3, 0, 37, 1)
    for backend, corner, packed in (("scalar", "gdn", None), ("op", "gla", cu_seqlens)):
        places = []
        rule.same_place = lambda x, y, places=places: places.append(same_place(x, y)) or places[-1]
        shape = Shape(2 if packed is None else 1, 41, 4, 4, 24, 40)
        inputs = make_inputs(CORNERS[corner], shape, cu_seqlens=packed)
        leaves = {name: x.requires_grad_() for name, x in inputs.items() if x is not None}
        found = []
        for on in (False, True):
            with recomputing(on):
                o, state = linear_attention(**leaves, cu_seqlens=packed, backend=backend)
            loss = (o * torch.linspace(0, 1, o.numel()).view_as(o)).sum() + state.sum()
            found.append(torch.autograd.grad(loss, list(leaves.values())))
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True)), corner
        assert [sum(places[i : i + 3]) for i in range(0, len(places), len(leaves))] == [3] * 4, places


def check_segments():
    """Sequences in segments of four chunks of 16 tokens, and of two: rows, documents, more value channels than a
    program takes, and more key channels than the scan takes at a time."""
    from glade.ops.linear_attention.triton import call as rule

    long, documents = Shape(B=1, T=135, H=1, HV=2, K=24, V=20), Shape(1, 183, 1, 1)
    cu_seqlens = borders(3, 0, 97, 1, 82)
    rule.LEAST_CHUNKS = 2
    for corner in CORNERS.values():
        check_interpreted(corner, long, segments=3)
    check_interpreted(CORNERS["gdn"], long, segments=3, gate="saturated", given_state=False)
    rule.LEAST_CHUNKS = rule.LEAST_SEGMENTS = 1
    check_interpreted(CORNERS["gdn"], Shape(B=2, T=71, H=1, HV=1, K=40, V=80), segments=6)
    check_interpreted(CORNERS["gdn"], Shape(B=1, T=71, H=1, HV=1, K=136, V=16), segments=3)
    check_interpreted(Corner("scalar", "scalar", "vector"), documents, cu_seqlens, segments=10, gate="extreme")
    for name in ("scalar-decay", "gla", "gdn2"):
        check_interpreted(CORNERS[name], documents, cu_seqlens, segments=10, gate="extreme")


def check_inverse():
    """In place; what stands on the diagonal and above it is not read."""
    import triton.language as tl

    from glade.ops.linear_attention.triton.prepare import inverse_kernel

    A = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)) / 4
    exact = torch.linalg.inv(torch.eye(32).double() + A.double().tril(-1))
    inverse_kernel[(3,)](A, C=32, LEVELS=5, DTYPE=tl.float32, PRECISION="ieee")
    assert (A - exact).abs().max() < 1e-5 * exact.abs().max()


def check_whole_tiles():
    """Copies of whole tiles: also of spans' tokens in the order that keys take them, where spans are whole; and that
    what does not lie as they need it, or is packed, is loaded row by row."""
    from glade.ops.linear_attention.triton import scalar_op, vector_op

    made, tiles_of = [], vector_op.tiles_of

    def noted(x, *tile):
        made.append((len(tile), tiles_of(x, *tile)))
        return made[-1][1]

    def check(name, shape, axes, whole, cu_seqlens=None):
        made.clear()
        check_interpreted(CORNERS[name], shape, cu_seqlens)
        assert {tiles is not None for n, tiles in made if n == axes} == whole, (name, shape)

    vector_op.tiles_of = scalar_op.tiles_of = noted
    for name in ("gla", "kda", "gdn2"):
        check(name, Shape(B=2, T=64, H=1, HV=2, K=24, V=32), 5, {True})
    check("gdn2", Shape(B=1, T=41, H=1, HV=2, K=24, V=32), 5, set())
    check("gdn2", Shape(B=1, T=64, H=1, HV=2, K=24, V=24), 5, set())
    check("gdn", Shape(B=2, T=41, H=1, HV=2, K=24, V=20), 4, {True})
    check("gdn", Shape(B=1, T=41, H=1, HV=2, K=18, V=20), 4, {True, False})
    check("gdn", Shape(B=1, T=41, H=1, HV=2, K=24, V=20), 4, set(), borders(3, 0, 37, 1))
    vector_op.tiles_of = scalar_op.tiles_of = tiles_of


def check_chunks_that_matter():
    """From a segment's end, and from its beginning; chunks that grow a state count, however far away what fades is."""
    global tl, chunks_that_matter  # where a kernel looks for names
    import triton
    import triton.language as tl

    from glade.ops.linear_attention.triton.scalar_segments import chunks_that_matter

    @triton.jit
    def kernel(fading, first, end, found):
        tl.store(found, chunks_that_matter(fading, first, end, 1, 2, False))
        tl.store(found + 1, chunks_that_matter(fading, first, end, 1, 2, True))

    def count(chunks):
        return max(
            [i + 1 for i, (_, grown) in enumerate(chunks) if sum(x for x, _ in chunks[:i]) + grown > -126], default=0
        )

    generator, some_are_left_out, growth_counted = torch.Generator().manual_seed(0), False, False
    for chunks, rate in ((0, 1.0), (1, 200.0), (7, 80.0), (150, 1.5), (150, 4.0), (150, 20.0), (64, 8.0), (64, 40.0)):
        faded = (-rate * torch.rand(chunks + 3, generator=generator)).double().round(decimals=2)
        faded[chunks // 2 + 1] = 100.0
        grown = (100 * torch.rand(chunks + 3, generator=generator) ** 4).double().round(decimals=2)
        of_head = torch.stack([faded, grown], 1)
        table = torch.stack([torch.zeros_like(of_head), of_head], 1).float().contiguous()
        found = torch.zeros(2, dtype=torch.int32)
        kernel[(1,)](table, 2, 2 + chunks, found)
        segment = of_head[2 : 2 + chunks].tolist()
        assert found.tolist() == [count(segment[::-1]), count(segment)], (chunks, rate)
        but_for_growth = [(x, 0.0) for x, _ in segment]
        growth_counted |= found.tolist() != [count(but_for_growth[::-1]), count(but_for_growth)]
        some_are_left_out |= max(found.tolist()) < chunks
    assert some_are_left_out and growth_counted


def register_interpreted():
    """`op` as a backend for the CPU, and the kernels for scalar gates, which `op` itself takes in bf16 only."""
    from glade.ops.linear_attention.triton import op, scalar_op, step

    for name, kernels in {"op": op, "scalar": scalar_op}.items():
        run = register(name, kernels.forward, kernels.backward, kernels.kept_like)
        dispatch.BACKENDS[name] = dispatch.Backend(name, run, step.step_, lambda device, dtype: None, automatic=False)


def check_interpreted(corner, shape, cu_seqlens=None, dtype=torch.float32, segments=0, **settings):
    inputs = make_inputs(corner, shape, cu_seqlens=cu_seqlens, dtype=dtype, **settings)
    backend = "op" if "vector" in (corner.g, corner.erase) else "scalar"
    assert segments_of(inputs, cu_seqlens) == segments
    found = errors(inputs, backend, cu_seqlens)
    assert not failures(found, dtype), (corner, shape, settings, found)


def segments_of(inputs, cu_seqlens):
    from glade.ops.linear_attention.triton import op

    *_, made_for_each = op.kept_like(**inputs, scale=1.0, cu_seqlens=cu_seqlens)
    return made_for_each.shape[0]


def check_interpreted_step():
    inputs = {n: x if n == "state" else x[:, 0] for n, x in make_inputs(CORNERS["gdn2"], Shape(T=1)).items()}
    states = {backend: inputs["state"].clone() for backend in ("reference", "op")}
    outputs = [linear_attention_step_(**{**inputs, "state": state}, backend=b) for b, state in states.items()]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*states.values())
