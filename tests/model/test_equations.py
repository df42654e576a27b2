"""Each linear mixer against its published equations, written out here token by token and head by head in fp64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glade.model import LanguageModel
from glade.model.mixer import Mixer, joint
from glade.model.mixers.linear import Gates, Linear
from glade.model.published import LinearOptions

LINEAR_CASES = [
    "linear", "linear l2", "linear nope", "retnet", "retnet nope", "gla",
    "gla gva conv", "gla temperature", "delta", "delta gva", "delta no conv",
    "delta kaczmarz", "gdn", "gdn gva", "gdn kaczmarz", "kda", "kda gva bounded", "gdn2", "gdn2 gva", "kla",
    "kla gva clip",
]  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_a_linear_mixer_is_its_published_equation(name: str, build: Callable[..., LanguageModel]) -> None:
    mixer = next(build(name, torch.float64).blocks()).mixer
    assert isinstance(mixer, Linear)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], published(mixer, x, name), rtol=0, atol=1e-11)


def gates_of(mixer: Mixer, x: Tensor, k: Tensor) -> Gates:
    assert isinstance(mixer, Linear)
    return mixer.gates(joint(x, *mixer.gate_maps()), k)


def published(mixer: Linear, x: Tensor, name: str) -> Tensor:
    o, w = mixer.options, dict(mixer.named_parameters())
    q = unit(o, feature_map(o, stream(o, x, w, "q")))
    k = unit(o, feature_map(o, stream(o, x, w, "k")))
    if o.rope:
        q, k = turned(q), turned(k)
    v = stream(o, x, w, "v")
    B, T, group = x.shape[0], x.shape[1], o.num_v_heads // o.num_heads
    y = torch.empty(B, T, o.num_v_heads, o.head_dim_v, dtype=x.dtype)
    for head in range(o.num_v_heads):
        key_head = head // group
        S = torch.zeros(B, o.head_dim, o.head_dim_v, dtype=x.dtype)
        for t in range(T):
            qt, kt, vt = q[:, t, key_head], k[:, t, key_head], v[:, t, head]
            alpha, erase, write = gates(name.split()[0], o, w, x[:, t], kt, head, key_head)
            S = alpha[..., None] * S
            S = (
                S
                - kt[:, :, None] * torch.einsum("bk,bkv->bv", erase * kt, S)[:, None]
                + kt[:, :, None] * (write * vt).unsqueeze(1)
            )
            y[:, t, head] = (o.scale or o.head_dim**-0.5) * torch.einsum("bk,bkv->bv", qt, S)
    y = output_norm(o, w, y).flatten(-2)
    if o.output_gate != "absent":
        z = low_rank(x, w, "output_gate_proj", o.output_gate_rank)
        y = y * (z * torch.sigmoid(z) if o.output_gate == "silu" else torch.sigmoid(z))
    return y @ w["o_proj.weight"].T


def turned(x: Tensor) -> Tensor:
    """x [B, T, H, K]: at position t, channels i and i + K/2 are turned by t * 10000^(-2i/K)."""
    y, half = x.clone(), x.shape[-1] // 2
    for t in range(x.shape[1]):
        for i in range(half):
            angle = torch.tensor(t * 10000.0 ** (-i / half), dtype=x.dtype)
            a, b = x[:, t, :, i], x[:, t, :, i + half]
            y[:, t, :, i] = a * angle.cos() - b * angle.sin()
            y[:, t, :, i + half] = b * angle.cos() + a * angle.sin()
    return y


def gates(
    kind: str, o: LinearOptions, w: dict[str, Tensor], x: Tensor, k: Tensor, head: int, key_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha [B, K] or [B, 1], erase, write for one value head and one token."""
    one, zero = torch.ones(len(x), 1, dtype=x.dtype), torch.zeros(len(x), 1, dtype=x.dtype)
    if kind == "linear":
        return one, zero, one
    if kind == "retnet":
        return one * (1 - 2.0 ** (-5 - head)), zero, one
    keys = slice(key_head * o.head_dim, (key_head + 1) * o.head_dim)
    if kind == "gla":
        if o.gate_form == "sigmoid_temperature":
            inner = F.silu(x @ w["decay_proj.0.weight"].T + w["decay_proj.0.bias"])
            z = inner @ w["decay_proj.1.weight"].T + w["decay_proj.1.bias"]
            return torch.sigmoid(z[:, keys] / o.gate_normalizer), zero, one
        z = x @ w["decay_proj.0.weight"].T @ w["decay_proj.1.weight"].T + w["decay_proj.1.bias"]
        return torch.sigmoid(z[:, keys]) ** (1 / o.gate_normalizer), zero, one
    step = one
    if o.kaczmarz:
        eta = torch.sigmoid(x @ w["eta_proj.weight"].T + w["eta_proj.bias"])[:, head : head + 1]
        energy = (k * k).sum(-1, keepdim=True)
        step = eta / (energy.clamp(min=o.kaczmarz_eps) if o.kaczmarz_eps_mode == "floor" else energy + o.kaczmarz_eps)
    clip = (lambda gate: gate.clamp(0, 1)) if o.kaczmarz_clip else (lambda gate: gate)
    double = 2 if o.allow_neg_eigval else 1
    if kind in ("gdn2", "kla"):
        values = slice(head * o.head_dim_v, (head + 1) * o.head_dim_v)
        erase = double * clip(step * torch.sigmoid(x @ w["erase_proj.weight"][keys].T))
        write = clip(step * torch.sigmoid(x @ w["write_proj.weight"][values].T))
        return decay(o, w, x, key_head, o.head_dim, o.gate_rank), erase, write
    beta = clip(step) if o.kaczmarz else torch.sigmoid(x @ w["beta_proj.weight"].T)[:, head : head + 1]
    alpha = one
    if kind == "gdn":
        alpha = decay(o, w, x, head, 1, 0)
    if kind == "kda":
        alpha = decay(o, w, x, head, o.head_dim, o.gate_rank)
    return alpha, double * beta, double * beta


def decay(o: LinearOptions, w: dict[str, Tensor], x: Tensor, head: int, channels: int, rank: int) -> Tensor:
    mine = slice(head * channels, (head + 1) * channels)
    z = low_rank(x, w, "decay_proj", rank)[:, mine] + w["dt_bias"][mine]
    A = w["A_log"][head].exp()
    if o.gate_lower_bound is not None:
        return (o.gate_lower_bound * torch.sigmoid(A * z)).exp()
    return (-A * torch.log1p(z.exp())).exp()


def low_rank(x: Tensor, w: dict[str, Tensor], name: str, rank: int) -> Tensor:
    last = f"{name}.1" if rank else name
    inner = x @ w[f"{name}.0.weight"].T if rank else x
    return inner @ w[f"{last}.weight"].T + w.get(f"{last}.bias", 0)


def stream(o: LinearOptions, x: Tensor, w: dict[str, Tensor], which: str) -> Tensor:
    """Projection, causal depthwise convolution, activation: [B, T, heads, channels]."""
    y = x @ w[f"{which}_proj.weight"].T
    if o.conv_size:
        taps = w[f"{which}_conv.weight"]
        padded = F.pad(y, (0, 0, o.conv_size - 1, 0))
        y = sum(taps[:, j] * padded[:, j : j + x.shape[1]] for j in range(o.conv_size))
    y = y * torch.sigmoid(y) if o.activation == "silu" else y
    return y.unflatten(-1, (o.num_v_heads if which == "v" else o.num_heads, -1))


def feature_map(o: LinearOptions, y: Tensor) -> Tensor:
    if o.feature_map == "elu1":
        return torch.where(y > 0, y + 1, y.exp())
    return y.clamp(min=0) if o.feature_map == "relu" else y


def unit(o: LinearOptions, y: Tensor) -> Tensor:
    return y / ((y * y).sum(-1, keepdim=True) + 1e-6).sqrt() if o.qk_l2norm else y


def output_norm(o: LinearOptions, w: dict[str, Tensor], y: Tensor) -> Tensor:
    if o.output_norm == "rmsnorm":
        return w["output_norm.weight"] * y / ((y * y).mean(-1, keepdim=True) + o.output_norm_eps).sqrt()
    centred = y - y.mean(-1, keepdim=True)
    scaled = centred / ((centred * centred).mean(-1, keepdim=True) + o.output_norm_eps).sqrt()
    return scaled if o.output_norm == "layernorm_plain" else scaled * w["output_norm.weight"] + w["output_norm.bias"]


def test_the_temperature_inside_the_sigmoid_forgets_at_once_and_outside_does_not(
    build: Callable[..., LanguageModel],
) -> None:
    """Why `sigmoid_temperature` is a compatibility option: around z = 0 it keeps half of the state per token."""
    inside, outside = (next(build(name).blocks()).mixer for name in ("gla temperature", "gla"))
    for mixer in (inside, outside):
        for parameter in mixer.decay_proj.parameters():  # type: ignore[union-attr]
            torch.nn.init.zeros_(parameter)
    x, k = torch.randn(1, 3, 32), torch.randn(1, 3, 2, 8)
    torch.testing.assert_close(gates_of(inside, x, k).g.exp().mean(), torch.tensor(0.5))  # type: ignore[union-attr]
    assert gates_of(outside, x, k).g.exp().mean() > 0.95  # type: ignore[union-attr]


def test_the_kaczmarz_step_moves_the_answer_at_k_the_fraction_eta_whatever_the_length_of_k(
    build: Callable[..., LanguageModel],
) -> None:
    """beta |k|^2 = eta, so long keys do not overshoot and short ones are not ignored."""
    mixer = next(build("delta kaczmarz", torch.float64).blocks()).mixer
    x, k = torch.randn(1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 2, 8, dtype=torch.float64)
    for length in (1e-1, 1.0, 30.0):
        erase = gates_of(mixer, x, length * k).erase
        assert erase is not None
        moved = erase.unflatten(-1, (2, 2)) * (length * k).square().sum(-1, keepdim=True)
        eta = torch.sigmoid(mixer.eta_proj(x)).unflatten(-1, (2, 2))  # type: ignore[union-attr]
        torch.testing.assert_close(moved, eta, rtol=1e-4, atol=0)  # eps is 1e-6 of |k|^2
