"""Lowering of the linear mixers: one instruction for the heads of all of them, the gates by the mixer's class."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from glade.infer.captured.instructions import Convolution, LinearHeads, Product
from glade.infer.captured.kernels import heads, product
from glade.model.mixer import first_map
from glade.model.mixers.decay import GLA, RetNet
from glade.model.mixers.delta import KDA, Delta, GatedDeltaNet, GatedDeltaNet2
from glade.model.mixers.linear import Linear, ShortConvolution

if TYPE_CHECKING:
    from glade.infer.captured.lower import Builder

_FEATURE_MAPS = {"identity": 0, "elu1": heads.FEATURE_ELU1.value, "relu": heads.FEATURE_RELU.value}
_OUTPUT_GATES = {
    "absent": heads.NO_OUTPUT_GATE.value,
    "silu": heads.SILU_GATE.value,
    "sigmoid": heads.SIGMOID_GATE.value,
}
_EPS_MODES = {"floor": heads.EPS_FLOOR.value, "add": heads.EPS_ADD.value}


class Gates(NamedTuple):
    """What is particular to a mixer: the maps its gates read, in the order of erase, write and eta, and constants."""

    kind: int = heads.NO_GATE.value
    maps: tuple[nn.Linear, ...] = ()
    decay: int = heads.NO_DECAY.value
    decay_map: nn.Module | None = None
    decay_heads: int = 1
    decay_channels: bool = False
    decay_constant: float = 1.0
    silu_between: bool = False


def lower_linear(b: "Builder", mixer: Linear, layer: int, norm: nn.Module | None) -> None:
    """Any of `GATES`, y added to the stream."""
    o, gates = mixer.options, GATES[type(mixer)](mixer)
    factored = [m for m in (gates.decay_map, mixer.output_gate_proj) if m is not None]
    maps = [mixer.q_proj, mixer.k_proj, mixer.v_proj, *gates.maps, *map(first_map, factored)]
    convolution = _convolution(b, mixer, layer)
    q, k, v, *places = b.project(maps, norm, convolution)
    gate_places, factor_places = places[: len(gates.maps)], places[len(gates.maps) :]
    factor_places, second = _second_factors(b, factored, factor_places, gates.silu_between)
    if second is not None and not gates.decay_channels:
        b.add(second)
        second = None
    y = b.place(mixer.value_dim)
    settings = {
        "SILU": convolution is None and o.activation == "silu",
        "FEATURES": _FEATURE_MAPS[o.feature_map],
        "UNIT": o.qk_l2norm,
        "D": round(o.head_dim * o.rope_fraction) if o.rope else 0,
        "DECAY": gates.decay,
        "DECAY_CHANNELS": gates.decay_channels,
        "GATES": gates.kind,
        "EPS_MODE": _EPS_MODES[o.kaczmarz_eps_mode],
        "CLIP": o.kaczmarz and o.kaczmarz_clip,
        "DOUBLED": o.allow_neg_eigval,
        "OUTPUT_GATE": _OUTPUT_GATES[o.output_gate],
    }
    learned = hasattr(mixer, "A_log")
    b.add(
        LinearHeads(
            layer=layer,
            shape=(o.num_heads, o.num_v_heads, o.head_dim, o.head_dim_v),
            q=q,
            k=k,
            v=v,
            output=y,
            norm=b.norm(mixer.output_norm),
            settings=settings,
            scale=o.head_dim**-0.5 if o.scale is None else o.scale,
            decay=0 if gates.decay_map is None else factor_places[0],
            decay_heads=gates.decay_heads,
            decay_constant=gates.decay_constant,
            a_log=b.weights.vector(mixer, "A_log") if learned else None,
            dt_bias=b.weights.vector(mixer, "dt_bias") if learned else None,
            erase=gate_places[0] if gate_places else 0,
            write=gate_places[1] if len(gate_places) > 1 else 0,
            kaczmarz_eps=o.kaczmarz_eps,
            output_gate=0 if mixer.output_gate_proj is None else factor_places[-1],
            log_theta=math.log(o.rope_theta),
            second=second,
        )
    )
    b.add_to_stream(mixer.o_proj, y)


def _convolution(b: "Builder", mixer: Linear, layer: int) -> Convolution | None:
    """The three convolutions as one over the channels of q, k and v."""
    if not mixer.options.conv_size:
        return None
    convolutions: list[ShortConvolution] = [mixer.q_conv, mixer.k_conv, mixer.v_conv]
    taps = b.weights.parameters_together(convolutions, "weight")
    b.convolved[layer] = len(taps)
    return Convolution(taps, layer, mixer.options.activation == "silu")


def _second_factors(
    b: "Builder", modules: list[nn.Module], places: list[int], silu: bool
) -> tuple[list[int], Product | None]:
    """Where the answers of full-rank or low-rank maps are, given those of their first factors.

    The second factors of two maps become one product where their shapes allow it: the second half of its columns reads
    its input further on. It is handed back: it is not yet an instruction.
    """
    second = [cast(nn.Linear, m[1]) if isinstance(m, nn.Sequential) else None for m in modules]
    low_rank = [m for m in second if m is not None]
    before = (product.SILU_OF if silu else product.AS_IT_IS).value
    if len(low_rank) == 2 and not silu:
        first, other = low_rank
        if first.in_features == other.in_features and first.out_features % 64 == 0:
            matrix = b.weights.together([first, other])
            place, boundary = b.place(matrix.rows), first.out_features
            shift = places[1] - places[0]
            both = Product(matrix, places[0], place, matrix.rows, boundary=boundary, shift=shift)
            return [place, place + boundary], both
    answers = []
    for module, source in zip(second, places, strict=True):
        if module is None:
            answers.append(source)
            continue
        matrix = b.weights.together([module])
        answers.append(b.place(matrix.rows))
        # only a decay's factors have something between them
        activation = before if not answers[:-1] else product.AS_IT_IS.value
        b.add(Product(matrix, source, answers[-1], matrix.rows, before=activation))
    return answers, None


def _no_gates(mixer: Linear) -> Gates:
    return Gates()


def _retnet(mixer: RetNet) -> Gates:
    return Gates(decay=heads.TABLE.value)


def _gla(mixer: GLA) -> Gates:
    o = mixer.options
    return Gates(
        decay=(heads.TEMPERED if mixer.inside else heads.LOGSIGMOID).value,
        decay_map=mixer.decay_proj,
        decay_heads=o.num_heads,
        decay_channels=True,
        decay_constant=o.gate_normalizer,
        silu_between=mixer.inside and bool(o.gate_rank),
    )


def _learned_decay(mixer: KDA | GatedDeltaNet | GatedDeltaNet2, num_heads: int, channels: bool) -> dict[str, Any]:
    bound = mixer.lower_bound
    return {
        "decay": (heads.SOFTPLUS if bound is None else heads.BOUNDED).value,
        "decay_map": mixer.decay_proj,
        "decay_heads": num_heads,
        "decay_channels": channels,
        "decay_constant": bound or 0.0,
    }


def _delta(mixer: Delta) -> Gates:
    if mixer.options.kaczmarz:
        return Gates(heads.ETA.value, (mixer.eta_proj,))
    return Gates(heads.BETA.value, (mixer.beta_proj,))


def _gdn(mixer: GatedDeltaNet) -> Gates:
    return _delta(mixer)._replace(**_learned_decay(mixer, mixer.options.num_v_heads, False))


def _kda(mixer: KDA) -> Gates:
    return _delta(mixer)._replace(**_learned_decay(mixer, mixer.options.num_v_heads, True))


def _gdn2(mixer: GatedDeltaNet2) -> Gates:
    decay = _learned_decay(mixer, mixer.options.num_heads, True)
    if mixer.options.kaczmarz:
        return Gates(heads.VECTORS_ETA.value, (mixer.erase_proj, mixer.write_proj, mixer.eta_proj), **decay)
    return Gates(heads.VECTORS.value, (mixer.erase_proj, mixer.write_proj), **decay)


# by the exact class: what a subclass changes is not known here
GATES: dict[type[nn.Module], Callable[[Any], Gates]] = {
    Linear: _no_gates,
    RetNet: _retnet,
    GLA: _gla,
    Delta: _delta,
    GatedDeltaNet: _gdn,
    KDA: _kda,
    GatedDeltaNet2: _gdn2,
}
