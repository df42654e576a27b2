"""Preference losses as pure functions of log-probabilities: no model, no data, testable with four numbers.

With the answers y_w (chosen) and y_l (rejected) to a prompt, |y| the number of their tokens (the one that ends the text
counted), pi the model in training and ref the one it started from:

    h       = log pi(y_w) - log ref(y_w)  -  (log pi(y_l) - log ref(y_l))
    h_mean  = the same with each answer's log-probability divided by its |y|

Every loss answers one number a pair, so that a caller may average over a step in as many passes as it likes; beside it
the metrics, one number a pair each:

    rewards_chosen, rewards_rejected   beta (log pi - log ref), as the loss scales them; what is compared
    margin                             rewards_chosen - rewards_rejected
    accuracy                           1 where the margin is positive, 0 where it is negative, 1/2 where neither answer
                                       is preferred (so it is for all pairs before the first step)
    logp_chosen, logp_rejected         log pi of the whole answers, nats
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLogProbs(NamedTuple):
    """What a model gives the two answers of each of B pairs."""

    chosen: Tensor  # [B] log-probability of the whole answer, nats
    rejected: Tensor  # [B]
    chosen_tokens: Tensor  # [B] tokens of the answer, the same for every model
    rejected_tokens: Tensor  # [B]

    def mean(self) -> "PairLogProbs":
        """A token's log-probability on average, in the place of the answer's."""
        return self._replace(chosen=self.chosen / self.chosen_tokens, rejected=self.rejected / self.rejected_tokens)


Metrics = dict[str, Tensor]


def sigmoid(
    policy: PairLogProbs, reference: PairLogProbs, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Metrics]:
    """-(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), where eps is the share of labels that are wrong.

    Sources: Rafailov et al. 2023, arXiv:2305.18290, equation 7 (eps = 0); Mitchell, A note on DPO with noisy
    preferences and relationship to IPO, 2023 (cDPO).
    """
    rewards = _rewards(policy, reference, beta)
    h = rewards.chosen - rewards.rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return loss, _metrics(policy, rewards)


def ipo(policy: PairLogProbs, reference: PairLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """(h_mean - 1 / (2 beta))^2: the margin is pulled to a value instead of to infinity. beta is the paper's tau.

    Sources: Azar et al. 2023, arXiv:2310.12036, equation 17; means instead of sums as its authors' experiments and
    other programs have it, so that one beta serves answers of all lengths.
    """
    rewards = _rewards(policy.mean(), reference.mean(), beta)
    h_mean = (rewards.chosen - rewards.rejected) / beta
    return (h_mean - 1 / (2 * beta)).square(), _metrics(policy, rewards)


def hinge(policy: PairLogProbs, reference: PairLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """max(0, 1 - beta h): a pair whose margin has reached 1 / beta teaches nothing more.

    Sources: Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF), with the reference's log-probabilities as in
    Liu et al. 2023, arXiv:2309.06657 (RSO), section 3.
    """
    rewards = _rewards(policy, reference, beta)
    return F.relu(1 - (rewards.chosen - rewards.rejected)), _metrics(policy, rewards)


def sigmoid_norm(policy: PairLogProbs, reference: PairLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta h_mean): length-normalised DPO, which cannot win by making answers longer.

    Source: Lambert et al. 2024, arXiv:2411.15124 (Tulu 3), section 5.
    """
    rewards = _rewards(policy.mean(), reference.mean(), beta)
    return -F.logsigmoid(rewards.chosen - rewards.rejected), _metrics(policy, rewards)


def simpo(policy: PairLogProbs, *, beta: float, gamma: float) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma): no reference model; gamma is a margin.

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6.
    """
    rewards = _rewards(policy.mean(), None, beta)
    return -F.logsigmoid(rewards.chosen - rewards.rejected - gamma), _metrics(policy, rewards)


def orpo(policy: PairLogProbs, *, beta: float) -> tuple[Tensor, Metrics]:
    """-mean log pi(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), log p = mean log pi.

    Fine-tuning on the chosen answers and preference in one; no reference model. beta is the paper's lambda.
    Source: Hong et al. 2024, arXiv:2403.07691, equations 4 to 7.
    """
    mean = policy.mean()
    odds = PairLogProbs(_log_odds(mean.chosen), _log_odds(mean.rejected), *policy[2:])
    preference = -F.logsigmoid(odds.chosen - odds.rejected)
    return -mean.chosen + beta * preference, _metrics(policy, _rewards(mean, None, beta))


LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
}


def _rewards(policy: PairLogProbs, reference: PairLogProbs | None, beta: float) -> PairLogProbs:
    if reference is None:
        return policy._replace(chosen=beta * policy.chosen, rejected=beta * policy.rejected)
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return policy._replace(chosen=beta * chosen, rejected=beta * rejected)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)), exact also where p is nearly 1 (there p is kept apart from 1, where odds are infinite)."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def _metrics(policy: PairLogProbs, rewards: PairLogProbs) -> Metrics:
    margin = rewards.chosen - rewards.rejected
    metrics = {
        "rewards_chosen": rewards.chosen,
        "rewards_rejected": rewards.rejected,
        "margin": margin,
        "accuracy": (margin.sign() + 1) / 2,
        "logp_chosen": policy.chosen,
        "logp_rejected": policy.rejected,
    }
    return {name: x.detach() for name, x in metrics.items()}
