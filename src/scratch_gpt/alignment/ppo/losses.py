"""The mathematics of PPO for language models, one function per formula.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438. KL penalty and its controller:
Ziegler et al. 2019, arXiv:1909.08593. Estimators of the KL divergence: Schulman 2020, joschu.net/blog/kl-approx.html.
Details of the published implementations: Huang et al. 2023, huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo.

Unless noted, tensors are (sequences, completion). A mask is 1 at the tokens of the completion, including its stop token, and
0 at the padding after them; masked values do not affect the result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

KLEstimator = Literal["k1", "k3"]


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Estimate KL(policy || reference) at tokens sampled from the policy, per token, in nats.

    k1 = log(policy / reference) is unbiased. k3 = reference / policy - 1 + k1 is unbiased, never negative, and has less
    variance; but as a penalty in the reward it has another optimum than the KL divergence itself, because its value depends
    on the policy, too (Tang & Munos 2025, arXiv:2506.09477).
    """
    log_ratio = logprobs - reference_logprobs
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages (GAE, eq. 16) and returns, the targets of the values; both are 0 where the mask is 0.

    ``values[:, t]`` is the value of the state before token t. The state after a completion's last token has value 0.
    """
    rewards, values = (torch.where(mask.bool(), x, 0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage  # still 0 in the padding
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    all_sum: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> torch.Tensor:
    """Scale to variance 1 and, with ``shift_mean``, to mean 0; ``all_sum`` sums a tensor over ranks."""
    count, total = all_sum(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    mean = total / count
    variance = all_sum(((x - mean).square() * mask).sum()) / count
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's clipped surrogate (eq. 7) as a loss per token, and where the clipped term is the larger one."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the larger of the squared errors of the value and of the clipped value, and where the latter is larger.

    A value is clipped to within ``cliprange`` of its old value, at the rollout.
    """
    near_old = torch.minimum(torch.maximum(values, old_values - cliprange), old_values + cliprange)
    unclipped, clipped = (values - returns).square(), (near_old - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 if the values predict the returns; NaN if these are constant."""
    is_token = mask.bool()
    variance = returns[is_token].var(correction=0)
    return float(1 - (returns - values)[is_token].var(correction=0) / variance) if variance > 0 else math.nan


@dataclass
class KLController:
    """The coefficient of the KL penalty: constant, or adapted to reach ``target`` nats per completion (Ziegler, sec. 2.2)."""

    coefficient: float
    target: float | None = None
    horizon: int = 10_000
    """Completions over which the coefficient can change by about a fifth."""

    def update(self, kl: float, completions: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * completions / self.horizon


@dataclass
class ScoreNormalizer:
    """Normalize scores by the mean and standard deviation of all scores so far, or of the first rollout only."""

    only_first: bool
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    def update(self, count: int, total: float, total_of_squares: float) -> None:
        """Add ``count`` scores by their sum and sum of squares (Chan et al. 1983, parallel variance)."""
        if self.only_first and self.count:
            return
        mean, new_count = total / count, self.count + count
        squares = max(total_of_squares - count * mean**2, 0.0)
        self.squares += squares + (mean - self.mean) ** 2 * self.count * count / new_count
        self.mean += (mean - self.mean) * count / new_count
        self.count = new_count

    def normalize(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores - self.mean) / (math.sqrt(self.squares / self.count) + 1e-8)
