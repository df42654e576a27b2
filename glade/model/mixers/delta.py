"""The delta family: before a value is written, what the state holds at its key is erased.

    S' = Diag(exp g_t) S_{t-1},   S_t = S' - k_t (erase_t * k_t)^T S' + k_t (write_t * v_t)^T

    delta   no decay                    erase = write = beta, one scalar a head
    gdn     decay per head              erase = write = beta
    kda     decay per key channel       erase = write = beta
    gdn2    decay per key channel       erase per key channel, write per value channel
    kla     gdn2 with the Kaczmarz step (`kaczmarz`, a switch on every mixer here)

The Kaczmarz step divides by the key's own energy, lambda = eta / |k|^2, so that the state's answer at k moves the
fraction eta of the way to its target whatever the length of k. With one scalar a head it takes beta's place
(the paper's form, on GDN); on gdn2 it multiplies both gates, optionally clipped to [0, 1].

Sources: arXiv:2406.06484 (DeltaNet), 2412.06464 (GDN), 2510.26692 (KDA), 2605.22791 (GDN-2), 2605.08587 (KLA),
2411.12537 (negative eigenvalues).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glade.model.mixer import KeepsFloat32, first_map, projection, second_map
from glade.model.mixers.linear import Gates, Linear
from glade.model.norm import upcast
from glade.model.published import LinearOptions
from glade.ops import log_decay, sigmoid


class Delta(Linear):
    """DeltaNet: erase = write = beta = sigmoid(x W), doubled with `allow_neg_eigval`."""

    _erases = True

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__(dim, options)
        if options.kaczmarz:
            self.eta_proj = nn.Linear(dim, options.num_v_heads, bias=True)
        else:
            self.beta_proj = nn.Linear(dim, options.num_v_heads, bias=False)

    def gate_maps(self) -> Sequence[Sequence[nn.Linear]]:
        return ((self.eta_proj if self.options.kaczmarz else self.beta_proj,),)

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        beta = self.beta(z[0], k)
        return Gates(None, beta, beta)

    def beta(self, z: Tensor, k: Tensor) -> Tensor:
        """[..., HV], one scalar a value head."""
        if self.options.kaczmarz:
            beta = kaczmarz_step(z, k, self.options)
            beta = beta.clamp(0, 1) if self.options.kaczmarz_clip else beta
        else:
            beta = torch.sigmoid(upcast(z))
        return 2 * beta if self.options.allow_neg_eigval else beta


def kaczmarz_step(eta: Tensor, k: Tensor, options: LinearOptions) -> Tensor:
    """lambda [..., HV] = sigmoid(eta) / |k|^2, in fp32, with k [..., H, K] as the recurrence sees it."""
    energy = upcast(k).square().sum(-1)
    eps = options.kaczmarz_eps
    energy = energy.clamp_min(eps) if options.kaczmarz_eps_mode == "floor" else energy + eps
    return torch.sigmoid(upcast(eta)) / energy.repeat_interleave(options.num_v_heads // options.num_heads, dim=-1)


class LearnedDecay(KeepsFloat32):
    """Mixin with the decay of Mamba-2's kind: g = -exp(A_log) * softplus(z + dt_bias), z = x W.

    A_log is one number per head, dt_bias one per channel; both stay fp32. With a lower bound (KDA's "safe gate") it
    is g = bound * sigmoid(exp(A_log) * (z + dt_bias)), so that a kernel may rely on its size.
    """

    float32_parameters = ("A_log", "dt_bias")
    MIN_DT, MAX_DT, FLOOR_DT = 1e-3, 0.1, 1e-4

    def add_decay(self, dim: int, heads: int, channels: int, rank: int, lower_bound: float | None) -> None:
        self.decay_proj = projection(dim, heads * channels, rank=rank)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * channels))
        self.lower_bound = lower_bound

    @torch.no_grad()
    def reset_decay(self) -> None:
        """A = U(1, 16); dt log-uniform in [1e-3, 0.1], with softplus(dt_bias) = dt."""
        self.A_log.uniform_(1, 16).log_()
        log_dt = self.dt_bias.uniform_(math.log(self.MIN_DT), math.log(self.MAX_DT))
        dt = log_dt.exp().clamp_min(self.FLOOR_DT)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def log_decay(self, z: Tensor) -> Tensor:
        """[..., heads, channels], from the answer of the projection's first map."""
        z, heads = second_map(self.decay_proj, z), len(self.A_log)
        rate = self.A_log.exp().repeat_interleave(len(self.dt_bias) // heads)
        if self.lower_bound is None:
            g = log_decay(z, rate=rate, bias=self.dt_bias)
        else:
            g = self.lower_bound * torch.sigmoid(rate * (upcast(z) + self.dt_bias))
        return g.unflatten(-1, (heads, -1))


class GatedDeltaNet(LearnedDecay, Delta):
    """g: one scalar per value head."""

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__(dim, options)
        self.add_decay(dim, options.num_v_heads, 1, rank=0, lower_bound=options.gate_lower_bound)

    def gate_maps(self) -> Sequence[Sequence[nn.Linear]]:
        return (*super().gate_maps(), (first_map(self.decay_proj),))

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        beta = self.beta(z[0], k)
        return Gates(self.log_decay(z[1]).squeeze(-1), beta, beta)


class KDA(LearnedDecay, Delta):
    """g: one per value head and key channel, of low rank."""

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__(dim, options)
        o = options
        self.add_decay(dim, o.num_v_heads, o.head_dim, rank=o.gate_rank, lower_bound=o.gate_lower_bound)

    def gate_maps(self) -> Sequence[Sequence[nn.Linear]]:
        return (*super().gate_maps(), (first_map(self.decay_proj),))

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        beta = self.beta(z[0], k)
        return Gates(self.log_decay(z[1]), beta, beta)


class GatedDeltaNet2(LearnedDecay, Linear):
    """g and erase per key channel (of the key heads), write per value channel; only erase is ever doubled."""

    _erases = True

    def __init__(self, dim: int, options: LinearOptions) -> None:
        super().__init__(dim, options)
        o = options
        self.add_decay(dim, o.num_heads, o.head_dim, rank=o.gate_rank, lower_bound=o.gate_lower_bound)
        self.erase_proj = nn.Linear(dim, self.key_dim, bias=False)
        self.write_proj = nn.Linear(dim, self.value_dim, bias=False)
        if o.kaczmarz:
            self.eta_proj = nn.Linear(dim, o.num_v_heads, bias=True)

    def gate_maps(self) -> Sequence[Sequence[nn.Linear]]:
        maps = ((self.erase_proj,), (self.write_proj,), (first_map(self.decay_proj),))
        return (*maps, (self.eta_proj,)) if self.options.kaczmarz else maps

    def gates(self, z: Sequence[Tensor], k: Tensor) -> Gates:
        o = self.options
        erase = self._over_value_heads(sigmoid(z[0]).unflatten(-1, (o.num_heads, -1)))
        write = sigmoid(z[1]).unflatten(-1, (o.num_v_heads, -1))
        if o.kaczmarz:
            step = kaczmarz_step(z[3], k, o)[..., None]
            erase, write = (self._stepped(gate, step) for gate in (erase, write))
        if o.allow_neg_eigval:
            erase = 2 * erase
        return Gates(self._over_value_heads(self.log_decay(z[2])), erase, write)

    def _stepped(self, gate: Tensor, step: Tensor) -> Tensor:
        scaled = gate * step
        return (scaled.clamp(0, 1) if self.options.kaczmarz_clip else scaled).to(gate.dtype)
