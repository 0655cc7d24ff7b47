"""The mathematics of PPO for language models, one function per formula.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438. KL penalty and its controller:
Ziegler et al. 2019, arXiv:1909.08593. Estimators of the KL divergence: Schulman 2020, joschu.net/blog/kl-approx.html.
Details of the published implementations: Huang et al. 2023, huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo.

Unless it says otherwise a tensor is (rows, completion tokens). A mask is 1 at the tokens of the completion, its stop token
among them, and 0 at the padding after them; the values that a mask hides do not matter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

KLEstimator = Literal["k1", "k3"]


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Estimate of KL(policy || reference) from tokens that the policy drew, per token, in nats.

    k1 = log(policy / reference) has the right mean. k3 = reference / policy - 1 + k1 has the same mean, is never negative
    and varies less; but as a penalty in the reward it leads to another optimum than the KL divergence itself, because it
    depends on the policy also through its own value (Tang & Munos 2025, arXiv:2506.09477).
    """
    log_ratio = logprobs - reference_logprobs
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (GAE, eq. 16) and the returns that the values are trained towards; both 0 where the mask is.

    ``values[:, t]`` is the value of the state before token t is chosen. Nothing follows a completion's last token.
    """
    rewards, values = (torch.where(mask.bool(), x, 0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = delta + gamma * lam * following_advantage  # still 0 in the padding
        advantages[:, t] = following_advantage
        following_value = values[:, t]
    return advantages, advantages + values


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    all_sum: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> torch.Tensor:
    """Scale to variance 1 and, with ``shift_mean``, to mean 0; ``all_sum`` adds up over processes."""
    count, total = all_sum(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    mean = total / count
    variance = all_sum(((x - mean).square() * mask).sum()) / count
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's surrogate (eq. 7) as a loss per token, and where clipping decided it."""
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error per token, of the worse of the value and the value kept near its old self; and where."""
    near = torch.minimum(torch.maximum(values, old_values - cliprange), old_values + cliprange)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1: the values foretell the returns; 0: no better than their mean. NaN where the returns do not vary."""
    chosen = mask.bool()
    variance = returns[chosen].var(correction=0)
    return float(1 - (returns - values)[chosen].var(correction=0) / variance) if variance > 0 else math.nan


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or steered towards ``target`` nats per completion (Ziegler, sec. 2.2)."""

    coefficient: float
    target: float | None = None
    horizon: int = 10_000
    """Completions over which the coefficient can grow by about a fifth of itself."""

    def update(self, kl: float, completions: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * completions / self.horizon


@dataclass
class ScoreNormalizer:
    """Mean and standard deviation of the scores seen, over all of them or over the first rollout only."""

    only_first: bool
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def update(self, count: int, total: float, total_of_squares: float) -> None:
        """Take ``count`` scores in (Chan et al. 1983, parallel variance)."""
        if self.only_first and self.count:
            return
        mean, together = total / count, self.count + count
        squares = max(total_of_squares - count * mean**2, 0.0)
        self.squares += squares + (mean - self.mean) ** 2 * self.count * count / together
        self.mean += (mean - self.mean) * count / together
        self.count = together

    def normalize(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores - self.mean) / (math.sqrt(self.squares / self.count) + 1e-8)
