"""Lowering: from a `LanguageModel` to the instructions of a decode program. Nothing is computed and no weight copied.

Each mixer becomes one product of all its projections with the normed input, the instruction of its heads, and the
output projection, which adds to the residual stream; each feed-forward network becomes two products.
"""

from typing import Any

import torch
from torch import nn

from glade.infer.lowering import CannotLower, Mixers, Networks
from glade.infer.native.builder import Builder, Projections
from glade.infer.native.linear import GATES, lower_linear
from glade.infer.native.program import Program
from glade.infer.native.records import NOWHERE, Act, AttentionHeads, Copy, Embed, Matrix, Target
from glade.model.ffn import GELU, SwiGLU
from glade.model.lm import LanguageModel
from glade.model.mixers.attention import Attention
from glade.model.mixers.rnn import Rnn
from glade.ops import native


def lower(model: LanguageModel) -> Program:
    """The decode program of `model`.

    Raises:
        CannotLower: there is no library here, or the model has a part or a dtype that no instruction knows; the
            message says which.
    """
    if native.LIBRARY is None:
        raise CannotLower(f"the library of the CPU kernels {native.ABSENCE}")
    b, config = Builder(model), model.config
    positions = Matrix() if model.positions is None else b.matrix(model.positions)
    b.add(Embed(table=b.matrix(model.embed), positions=positions, output=b.stream))
    for block in model.blocks():
        options: Any = getattr(block.mixer, "options", None)
        if options is not None and options.rope:
            b.add_rotation(options.rope_theta, round(options.head_dim * options.rope_fraction))
    b.lower_blocks(model, _MIXERS, _NETWORKS)
    head = b.matrix(model.embed if model.lm_head is None else model.lm_head)
    # the rows beyond the vocabulary are never asked for
    head.rows = config.vocab_size
    b.matmul(b.stream, b.dim, [(head, 0)], norm=b.norm(model.final_norm), target=Target.LOGITS)
    return b.program()


def _lower_attention(b: Builder, mixer: Attention, layer: int, norm: nn.Module | None) -> None:
    o, projections = mixer.options, Projections(b)
    q, k, v = (projections.add(each) for each in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    gate = NOWHERE if mixer.output_gate_proj is None else projections.add(mixer.output_gate_proj)
    projections.emit(norm)
    turned = round(o.head_dim * o.rope_fraction) if o.rope else 0
    values = o.num_heads * o.head_dim_v
    y = b.place(values)
    b.add(
        AttentionHeads(
            num_heads=o.num_heads,
            num_kv_heads=o.num_kv_heads,
            key_dim=o.head_dim,
            value_dim=o.head_dim_v,
            scale=o.head_dim**-0.5 if o.scale is None else o.scale,
            q=q,
            k=k,
            v=v,
            gate=gate,
            output=y,
            q_norm=b.norm(mixer.q_norm),
            k_norm=b.norm(mixer.k_norm),
            rotation=b.rotation(o.rope_theta, turned) if turned else NOWHERE,
            turned=turned,
            keys=b.state(layer, "k", (o.window, o.num_kv_heads, o.head_dim)),
            values=b.state(layer, "v", (o.window, o.num_kv_heads, o.head_dim_v)),
            window=o.window or 0,
        )
    )
    b.matmul(y, values, [(b.matrix(mixer.o_proj), b.stream)], target=Target.ADD)


def _lower_rnn(b: Builder, mixer: Rnn, layer: int, norm: nn.Module | None) -> None:
    activation = Act.TANH if mixer.activation == "tanh" else Act.SLIDE
    projections = Projections(b)
    h = projections.add(mixer.x_proj)
    transition = b.parameter_matrix(mixer, "w_hh")
    units = transition.rows
    before, hidden = b.place(units), b.state(layer, "hidden", (units,), (torch.float32,))
    projections.emit(norm)
    b.add(Copy(place=before, width=units, state=hidden, save=0))
    b.matmul(before, units, [(transition, h)], activation=activation, target=Target.ACCUMULATE)
    b.add(Copy(place=h, width=units, state=hidden, save=1))
    b.matmul(h, units, [(b.matrix(mixer.o_proj), b.stream)], activation=activation, target=Target.ADD)


def _lower_swiglu(b: Builder, ffn: SwiGLU, norm: nn.Module | None) -> None:
    gate, up = b.matrix(ffn.gate), b.matrix(ffn.up)
    hidden = b.place(gate.rows)
    b.matmul(b.stream, b.dim, [(gate, hidden), (up, hidden)], norm=b.norm(norm), activation=Act.SWIGLU)
    b.matmul(hidden, gate.rows, [(b.matrix(ffn.down), b.stream)], target=Target.ADD)


def _lower_gelu(b: Builder, ffn: GELU, norm: nn.Module | None) -> None:
    up = b.matrix(ffn.up)
    hidden = b.place(up.rows)
    b.matmul(b.stream, b.dim, [(up, hidden)], norm=b.norm(norm), activation=Act.GELU)
    b.matmul(hidden, up.rows, [(b.matrix(ffn.down), b.stream)], target=Target.ADD)


_MIXERS: Mixers = {
    Attention: _lower_attention,
    Rnn: _lower_rnn,
    **dict.fromkeys(GATES, lower_linear),
}
_NETWORKS: Networks = {
    SwiGLU: _lower_swiglu,
    GELU: _lower_gelu,
}
