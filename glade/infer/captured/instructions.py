"""The instructions of a captured program: each launches one kernel, or few, on tensors of the run it is given.

A place is the first column of some numbers in the workspace, which has a row a sequence.
"""

# Triton is not installed everywhere, and its types know nothing of launches: a kernel's constexpr takes plain numbers
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from glade.infer.captured.kernels import attention, heads, product, rows
from glade.infer.captured.weights import Matrix
from glade.model.mixer import Mixer
from glade.model.state import State

_MOST_TILE_ROWS = 64
# from here on torch's product, whose tiles and parts of K are chosen by shape
_LIBRARY_ROWS = 16
_FINISHED = 256  # columns of a program behind it
_LARGEST_STATE_TILE = 128 * 128
# more programs than processors: few enough registers of a thread that two programs of 256 share one
_CROWDED, _HEADS_REGISTERS = 132, 128
_MOST_FACTOR_BYTES = 2**15  # of each of two second factors that a head holds in registers beside its state


class Run(NamedTuple):
    """What the instructions of one step work on."""

    ids: Tensor  # [B] int64
    slots: Tensor  # [B] int64
    live: Tensor  # [B] int64, 0 where nobody sits
    state: State
    pasts: tuple[Tensor | None, ...]  # of each layer what its convolutions remember, [rows, channels, W - 1]
    workspace: Tensor  # [B, places]
    logits: Tensor  # [B, vocab] fp32
    overlap: dict[str, bool]  # how kernels are launched: `overlapping`

    def at(self, place: int) -> Tensor:
        return self.workspace[0, place:]

    @property
    def stride(self) -> int:
        return self.workspace.stride(0)


def overlapping(device: torch.device) -> dict[str, bool]:
    """Launch settings of every kernel: whether it may begin while the one before it ends."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


class Norm(NamedTuple):
    kind: int  # of kernels.heads
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def launch(self, run: Run, source: int, out: Tensor, out_stride: int, width: int) -> None:
        """The norm of `width` numbers at `source`, to `out`."""
        rows.norm_kernel[(len(run.ids),)](
            run.at(source), run.stride, self.weight, self.bias, self.eps, out, out_stride, width,
            BD=triton.next_power_of_2(width), NORM=self.kind, AFFINE=self.weight is not None, **run.overlap,
        )  # fmt: skip


NO_NORM = Norm(0, None, None, 0.0)


class Embed(NamedTuple):
    table: Matrix
    positions: Tensor | None
    output: int

    def launch(self, run: Run) -> None:
        D = self.table.columns
        rows.embed_kernel[(len(run.ids),)](
            run.ids, run.slots, run.state.position, self.table.values, self.table.scales, self.positions,
            run.at(self.output), run.stride, D,
            BD=triton.next_power_of_2(D), INT8=self.table.scales is not None, LEARNED=self.positions is not None,
            **run.overlap,
        )  # fmt: skip


class Normalize(NamedTuple):
    """The norm of `width` numbers at `source`, to `output`, which may be `source`."""

    norm: Norm
    source: int
    output: int
    width: int

    def launch(self, run: Run) -> None:
        self.norm.launch(run, self.source, run.at(self.output), run.stride, self.width)


class Convolution(NamedTuple):
    """The short convolution of a product's first columns."""

    taps: Tensor  # [channels, W]
    layer: int
    silu: bool


class Product(NamedTuple):
    """y = act(norm(x) W^T + b). From column `boundary` on, x is read `shift` places further on."""

    matrix: Matrix
    source: int
    output: int | None  # None: the logits
    width: int  # columns of y: fewer than the matrix has rows where SwiGLU halves them, or ids do not exist
    before: int = product.AS_IT_IS.value
    norm: Norm = NO_NORM
    activation: int = product.NONE.value
    target: int = product.STORE.value
    convolution: Convolution | None = None
    boundary: int = 2**31 - 1
    shift: int = 0

    def launch(self, run: Run) -> None:
        num_rows, K = len(run.ids), self.matrix.columns
        if num_rows >= _LIBRARY_ROWS and self._suits_library():
            self._launch_library(run)
            return
        out = run.logits if self.output is None else run.at(self.output)
        past, constants = self._past(run)
        kernel, grid, settings = self._tiles(num_rows, K)
        kernel[grid](
            run.at(self.source), run.stride, self.matrix.values, self.matrix.scales, self.matrix.bias,
            self.norm.weight, self.norm.eps, *past, run.slots, out,
            run.logits.stride(0) if self.output is None else run.stride,
            num_rows, self.width, self.boundary, self.shift,
            K=K, BEFORE=self.before, INT8=self.matrix.scales is not None, **constants, **settings, **run.overlap,
        )  # fmt: skip

    def _past(self, run: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `product.finish` is told of the convolution, and its constants."""
        constants = dict(ACT=self.activation, TARGET=self.target, BIAS=self.matrix.bias is not None)
        if self.convolution is None:
            return (None, None, 0, 0), constants | dict(CONV=False, W=1, STEPS=1, SILU=False)
        taps, layer, silu = self.convolution
        past = run.pasts[layer]
        assert past is not None
        channels, W = taps.shape
        steps = triton.next_power_of_2(max(W - 1, 1))
        return (taps, past, past.stride(0), channels), constants | dict(CONV=True, W=W, STEPS=steps, SILU=silu)

    def _suits_library(self) -> bool:
        """Whether torch's product does it: not of int8, nor where logits would be rounded to the weights' dtype."""
        plain = self.before != product.SILU_OF.value and self.boundary >= self.width
        return plain and self.matrix.scales is None and self.output is not None

    def _launch_library(self, run: Run) -> None:
        """As torch's product, with kernels for what stands before and after it, if anything does."""
        assert self.output is not None
        K, num_rows = self.matrix.columns, len(run.ids)
        x = run.workspace[:, self.source : self.source + K]
        if self.before != product.AS_IT_IS.value:
            x = torch.empty(num_rows, K, dtype=x.dtype, device=x.device)
            self.norm.launch(run, self.source, x, K, K)
        twice = self.activation == product.SWIGLU.value
        weight = self.matrix.values[: 2 * self.width if twice else self.width].t()
        out = run.workspace[:, self.output : self.output + self.width]
        if self.matrix.bias is None and self.activation == product.NONE.value and self.convolution is None:
            if self.target == product.ADD.value:
                out.addmm_(x, weight)
            else:
                torch.mm(x, weight, out=out)
            return
        y = torch.mm(x, weight)
        past, constants = self._past(run)
        product.finish_kernel[(triton.cdiv(self.width, _FINISHED), num_rows)](
            y, y.stride(0), self.matrix.bias, *past, run.slots, out, run.stride, self.width,
            BN=_FINISHED, **constants, **run.overlap, num_warps=2,
        )  # fmt: skip

    def _tiles(self, num_rows: int, K: int) -> tuple[Any, tuple[int, ...], dict[str, int]]:
        """The kernel, its grid and its block sizes."""
        if num_rows == 1:
            # a row of W in one go: all of a program's loads are on their way before it waits for any
            BK = min(triton.next_power_of_2(K), 4096)
            BN = 8 if self.width > 2048 and BK <= 1024 else 4
            warps = 8 if BN * BK > 8192 else 4
            return product.vector_kernel, (triton.cdiv(self.width, BN),), dict(BN=BN, BK=BK, num_warps=warps)
        wide = 1 if self.matrix.values.dtype == torch.float32 else 0
        M = min(max(triton.next_power_of_2(num_rows), 16), _MOST_TILE_ROWS >> wide)
        BN = 16 if self.width <= 2048 else 32 if self.width <= 16384 else 64
        # the product of two tiles takes at least 16
        BK = max(min(triton.next_power_of_2(K), 128 >> wide), 16)
        grid = (triton.cdiv(self.width, BN), triton.cdiv(num_rows, M))
        return product.tile_kernel, grid, dict(M=M, BN=BN, BK=BK, STAGES=3, num_warps=4)


class LinearHeads(NamedTuple):
    """The heads of a linear mixer; what the settings mean is in kernels.heads."""

    layer: int
    shape: tuple[int, int, int, int]  # H, HV, K, V
    q: int
    k: int
    v: int
    output: int
    norm: Norm
    settings: dict[str, Any]  # the constants of the kernel that differ between mixers
    scale: float
    decay: int = 0
    decay_heads: int = 1
    decay_constant: float = 1.0
    a_log: Tensor | None = None
    dt_bias: Tensor | None = None
    erase: int = 0
    write: int = 0
    kaczmarz_eps: float = 0.0
    output_gate: int = 0
    log_theta: float = 0.0
    second: Product | None = None  # what makes the decays and output gates; few rows' heads do it themselves

    def launch(self, run: Run) -> None:
        H, HV, K, V = self.shape
        decay, output_gate, factors, factors_bias, rank = self.decay, self.output_gate, None, None, 0
        if self.second is not None:
            if self._are_factored(len(run.ids)):
                decay, output_gate = self.second.source, self.second.source + self.second.shift
                factors, _, factors_bias = self.second.matrix
                rank = self.second.matrix.columns
            else:
                self.second.launch(run)
        layer = run.state.layers[self.layer]
        KP, VP = triton.next_power_of_2(K), triton.next_power_of_2(V)
        BV = min(VP, max(_LARGEST_STATE_TILE // KP, 1))
        registers = _HEADS_REGISTERS if len(run.ids) * HV > _CROWDED else None
        heads.heads_kernel[(len(run.ids) * HV,)](
            run.workspace, run.stride, self.q, self.k, self.v, decay, self.erase, self.write, output_gate,
            run.at(self.output), run.stride, run.slots, run.state.position, run.live, layer.length,
            layer.recurrent, self.a_log, self.dt_bias, self.norm.weight, self.norm.bias, self.norm.eps, self.scale,
            self.decay_constant, self.kaczmarz_eps, self.log_theta, factors, factors_bias,
            HV, HV // H, HV // self.decay_heads,
            K=K, V=V, KP=KP, BV=BV, NUM_V=triton.cdiv(V, BV), NORM=self.norm.kind, AFFINE=self.norm.weight is not None,
            RANK=rank, **self.settings, **run.overlap, num_warps=8, maxnreg=registers,
        )  # fmt: skip

    def _are_factored(self, num_rows: int) -> bool:
        """Whether the heads take the place of `second`: a kernel less, whose weights are read ahead of the wait. Every
        program holds its head's: only where there are registers, and few programs that read the same ones."""
        assert self.second is not None
        _, HV, K, V = self.shape
        matrix, widest = self.second.matrix, triton.next_power_of_2(max(K, V))
        fits = widest * matrix.columns * matrix.values.element_size() <= _MOST_FACTOR_BYTES
        even = matrix.columns == triton.next_power_of_2(matrix.columns) and widest <= 128
        return fits and even and matrix.scales is None and num_rows * HV <= _CROWDED


class AttentionHeads(NamedTuple):
    """Attention of one token a row over the cache."""

    layer: int
    shape: tuple[int, int, int, int]  # H, HKV, K, V
    q: int
    k: int
    v: int
    gate: int | None
    output: int
    scale: float
    q_norm: Norm
    k_norm: Norm
    turned: int
    log_theta: float

    def launch(self, run: Run) -> None:
        H, HKV, K, V = self.shape
        layer, num_rows = run.state.layers[self.layer], len(run.ids)
        room = layer.k.shape[1]
        splits = min(triton.next_power_of_2(triton.cdiv(room, 256)), 16)
        KP, VP = triton.next_power_of_2(K), triton.next_power_of_2(V)

        def floats(*shape: int) -> Tensor:
            return torch.empty(num_rows * H, *shape, device=run.ids.device)

        q, sums, tops, totals = floats(K), floats(splits, V), floats(splits), floats(splits)
        attention.enter_kernel[(num_rows * (H + HKV),)](
            run.workspace, run.stride, self.q, self.k, self.v, q, layer.k, layer.v, run.slots, run.state.position,
            run.live, layer.length, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.k_norm.eps,
            self.log_theta, H, HKV, K, V, room,
            KP=KP, VP=VP, D=self.turned, NORM=self.q_norm.kind != 0, **run.overlap,
        )  # fmt: skip
        attention.attend_kernel[(num_rows * H, splits)](
            q, layer.k, layer.v, run.slots, run.state.position, sums, tops, totals, self.scale,
            H, H // HKV, K, V, room, KP=KP, VP=VP, BS=32, SPLITS=splits, **run.overlap,
        )  # fmt: skip
        attention.join_kernel[(num_rows * H,)](
            sums, tops, totals, run.workspace, run.stride, self.gate or 0, run.at(self.output), run.stride, H, V,
            VP=VP, SPLITS=splits, GATE=self.gate is not None, **run.overlap,
        )  # fmt: skip


class OwnStep(NamedTuple):
    """A mixer's own `step_`, where it asks the device for nothing: y is added to the numbers at `target`."""

    mixer: Mixer
    layer: int
    source: int
    target: int
    width: int

    def launch(self, run: Run) -> None:
        x = run.workspace[:, self.source : self.source + self.width]
        y, after = self.mixer.step_(x, run.state.layers[self.layer], run.slots)
        assert all(a is b for a, b in zip(after, run.state.layers[self.layer], strict=True))
        run.workspace[:, self.target : self.target + self.width] += y


class Advance(NamedTuple):
    """Every row has read one token more."""

    def launch(self, run: Run) -> None:
        rows.advance_kernel[(len(run.ids),)](run.state.position, run.slots, run.live, **run.overlap)


Instruction = Embed | Normalize | Product | LinearHeads | AttentionHeads | OwnStep | Advance
