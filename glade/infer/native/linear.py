"""Lowering of the linear mixers: one instruction for the heads of all of them, the gates by the mixer's class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from glade.infer.native.builder import Builder, Projections
from glade.infer.native.records import NOWHERE, Decay, LinearHeads, Projected, Target
from glade.model.mixers.decay import GLA, RetNet
from glade.model.mixers.delta import KDA, Delta, GatedDeltaNet, GatedDeltaNet2
from glade.model.mixers.linear import Linear, ShortConvolution

# what a gate's lowering says: members of LinearHeads
Members = dict[str, Any]

_FEATURE_MAPS = {"identity": 0, "elu1": 1, "relu": 2}
_OUTPUT_GATES = {"absent": 0, "silu": 1, "sigmoid": 2}
_EPS_MODES = {"floor": 1, "add": 2}


def lower_linear(b: Builder, mixer: Linear, layer: int, norm: nn.Module | None) -> None:
    """Any of `GATES`, y added to the stream."""
    o, projections = mixer.options, Projections(b)
    q, k, v = (projections.add(each) for each in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    gate = Projected() if mixer.output_gate_proj is None else projections.add_factored(mixer.output_gate_proj)
    gates = GATES[type(mixer)](b, projections, mixer)
    projections.emit(norm)
    y = b.place(mixer.value_dim)
    turned = round(o.head_dim * o.rope_fraction) if o.rope else 0
    b.add(
        LinearHeads(
            num_heads=o.num_heads,
            num_value_heads=o.num_v_heads,
            key_dim=o.head_dim,
            value_dim=o.head_dim_v,
            scale=o.head_dim**-0.5 if o.scale is None else o.scale,
            q=q,
            k=k,
            v=v,
            output=y,
            silu=o.activation == "silu",
            feature_map=_FEATURE_MAPS[o.feature_map],
            unit=o.qk_l2norm,
            rotation=b.rotation(o.rope_theta, turned) if turned else NOWHERE,
            turned=turned,
            recurrent=b.state(layer, "recurrent", (o.num_v_heads, o.head_dim, o.head_dim_v), (torch.float32,)),
            output_norm=b.norm(mixer.output_norm),
            output_gate=_OUTPUT_GATES[o.output_gate],
            output_gate_input=gate,
            **_convolutions(b, mixer, layer),
            **gates,
        )
    )
    b.matmul(y, mixer.value_dim, [(b.matrix(mixer.o_proj), b.stream)], target=Target.ADD)


def _convolutions(b: Builder, mixer: Linear, layer: int) -> Members:
    members: Members = {"taps": mixer.options.conv_size}
    convolutions: dict[str, ShortConvolution] = {"q": mixer.q_conv, "k": mixer.k_conv, "v": mixer.v_conv}
    for name, convolution in convolutions.items():
        members[f"past_{name}"] = b.state(layer, f"conv_{name}", (convolution.channels, convolution.num_past))
        if mixer.options.conv_size:
            members[f"conv_{name}"] = b.vector(convolution, "weight")
    return members


def _no_gates(b: Builder, projections: Projections, mixer: Linear) -> Members:
    return {"beta": NOWHERE, "erase": NOWHERE, "write": NOWHERE, "eta": NOWHERE}


def _retnet(b: Builder, projections: Projections, mixer: RetNet) -> Members:
    head = torch.arange(mixer.options.num_v_heads, dtype=torch.float32)
    table = b.constant(torch.log1p(-torch.exp2(-5 - head)))
    return _no_gates(b, projections, mixer) | {"decay": Decay.TABLE, "a_log": table}


def _gla(b: Builder, projections: Projections, mixer: GLA) -> Members:
    o = mixer.options
    silu = mixer.inside and bool(o.gate_rank)
    return _no_gates(b, projections, mixer) | {
        "decay": Decay.TEMPERED if mixer.inside else Decay.LOGSIGMOID,
        "decay_heads": o.num_heads,
        "decay_channels": o.head_dim,
        "decay_constant": o.gate_normalizer,
        "decay_input": projections.add_factored(mixer.decay_proj, silu=silu),
    }


def _learned_decay(
    b: Builder, projections: Projections, mixer: KDA | GatedDeltaNet | GatedDeltaNet2, heads: int, channels: int
) -> Members:
    bound = mixer.lower_bound
    return {
        "decay": Decay.SOFTPLUS if bound is None else Decay.BOUNDED,
        "decay_heads": heads,
        "decay_channels": channels,
        "decay_constant": bound or 0.0,
        "decay_input": projections.add_factored(mixer.decay_proj),
        "a_log": b.vector(mixer, "A_log"),
        "dt_bias": b.vector(mixer, "dt_bias"),
    }


def _kaczmarz(mixer: Linear) -> Members:
    o = mixer.options
    return {
        "kaczmarz": _EPS_MODES[o.kaczmarz_eps_mode] if o.kaczmarz else 0,
        "kaczmarz_eps": o.kaczmarz_eps,
        "clip": o.kaczmarz and o.kaczmarz_clip,
        "doubled": o.allow_neg_eigval,
    }


def _delta(b: Builder, projections: Projections, mixer: Delta) -> Members:
    step: nn.Module = mixer.eta_proj if mixer.options.kaczmarz else mixer.beta_proj
    name = "eta" if mixer.options.kaczmarz else "beta"
    gates = _no_gates(b, projections, mixer) | {name: projections.add(step)}
    return gates | _kaczmarz(mixer)


def _gdn(b: Builder, projections: Projections, mixer: GatedDeltaNet) -> Members:
    decay = _learned_decay(b, projections, mixer, mixer.options.num_v_heads, 1)
    return _delta(b, projections, mixer) | decay


def _kda(b: Builder, projections: Projections, mixer: KDA) -> Members:
    decay = _learned_decay(b, projections, mixer, mixer.options.num_v_heads, mixer.options.head_dim)
    return _delta(b, projections, mixer) | decay


def _gdn2(b: Builder, projections: Projections, mixer: GatedDeltaNet2) -> Members:
    o = mixer.options
    decay = _learned_decay(b, projections, mixer, o.num_heads, o.head_dim)
    gates = {
        "beta": NOWHERE,
        "erase": projections.add(mixer.erase_proj),
        "write": projections.add(mixer.write_proj),
        "eta": projections.add(mixer.eta_proj) if o.kaczmarz else NOWHERE,
    }
    return decay | gates | _kaczmarz(mixer)


# by the exact class: what a subclass changes is not known here
GATES: dict[type[nn.Module], Callable[[Builder, Projections, Any], Members]] = {
    Linear: _no_gates,
    RetNet: _retnet,
    GLA: _gla,
    Delta: _delta,
    GatedDeltaNet: _gdn,
    KDA: _kda,
    GatedDeltaNet2: _gdn2,
}
