"""Each formula against plain NumPy, written from its definition, on completions of different lengths."""

import math

import numpy as np
import pytest
import torch

from scratch_gpt.alignment.ppo.losses import (
    KLController,
    ScoreNormalizer,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    whiten,
)

LENGTHS = [1, 3, 7, 5]


@pytest.fixture
def numbers():
    """Four random tensors (sequences, 7), and the mask of LENGTHS."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(len(LENGTHS), max(LENGTHS), generator=generator, dtype=torch.float64) for _ in range(4)]
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return *tables, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_advantages_are_the_discounted_sum_of_temporal_differences(numbers, gamma, lam):
    rewards, values, _, _, mask = numbers
    padded = values.masked_fill(mask == 0, math.nan)  # masked values must not affect the result
    advantages, returns = generalized_advantages(rewards, padded, mask, gamma, lam)
    r, v = rewards.numpy(), values.numpy()
    for row, length in enumerate(LENGTHS):
        delta = [r[row, t] + (gamma * v[row, t + 1] if t + 1 < length else 0) - v[row, t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(expected + v[row, t], abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()
    if lam == 1.0:  # then the return is the discounted sum of the rewards, for any values
        assert float(returns[2, 0]) == pytest.approx(sum(gamma**t * r[2, t] for t in range(7)), abs=1e-12)


def test_whitening_gives_mean_0_and_variance_1_under_the_mask(numbers):
    x, *_, mask = numbers
    shown = mask.numpy().astype(bool)
    expected = (x.numpy() - x.numpy()[shown].mean()) / x.numpy()[shown].std()
    np.testing.assert_allclose(whiten(x, mask).numpy(), np.where(shown, expected, 0), rtol=1e-6)
    kept = whiten(x, mask, shift_mean=False).numpy()
    np.testing.assert_allclose(kept, np.where(shown, expected + x.numpy()[shown].mean(), 0), rtol=1e-6)
    assert not whiten(torch.full_like(x, 3.0), mask).any()  # no variance: nothing to learn


def test_whitening_on_two_ranks_is_that_of_all_sequences(numbers):
    x, *_, mask = numbers
    sums = []

    def record(value):
        sums.append(value)
        return value

    # a rank of two gets the sums over both, in the order of its all-reduces
    full = whiten(x, mask, all_sum=record)
    totals = iter(sums)
    shard = whiten(x[:2], mask[:2], all_sum=lambda _: next(totals))
    torch.testing.assert_close(shard, full[:2])


def test_policy_loss_is_the_clipped_surrogate(numbers):
    logprobs, old, advantages, *_ = numbers
    losses, clipped = clipped_policy_loss(logprobs, old, advantages, 0.2)
    ratio = np.exp(logprobs.numpy() - old.numpy())
    surrogate = np.minimum(
        ratio * advantages.numpy(), np.clip(ratio, 0.8, 1.2) * advantages.numpy()
    )  # eq. 7 of the paper, to be maximized
    np.testing.assert_allclose(losses.numpy(), -surrogate, rtol=1e-12)
    outside = ((ratio > 1.2) & (advantages.numpy() > 0)) | ((ratio < 0.8) & (advantages.numpy() < 0))
    assert (clipped.numpy() == outside).all() and outside.any()


def test_value_loss_takes_the_worse_of_the_value_and_the_clipped_value(numbers):
    values, old, returns, _, _ = numbers
    losses, clipped = clipped_value_loss(values, old, returns, 0.3)
    v, o, r = (x.numpy() for x in (values, old, returns))
    near = np.clip(v, o - 0.3, o + 0.3)
    np.testing.assert_allclose(losses.numpy(), 0.5 * np.maximum((v - r) ** 2, (near - r) ** 2), rtol=1e-12)
    assert (clipped.numpy() == ((near - r) ** 2 > (v - r) ** 2)).all() and clipped.any()


def test_both_estimators_have_the_mean_of_the_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        # the exact expectation over all tokens
        estimates = kl_estimate(policy, reference, estimator)
        assert float((policy.exp() * estimates).sum()) == pytest.approx(exact, abs=1e-12)
    assert (kl_estimate(policy, reference, "k3") >= 0).all() and (kl_estimate(policy, reference, "k1") < 0).any()


def test_explained_variance(numbers):
    returns, noise, *_, mask = numbers
    shown = mask.numpy().astype(bool)
    values = returns + 0.5 * noise
    expected = 1 - np.var((returns - values).numpy()[shown]) / np.var(returns.numpy()[shown])
    assert explained_variance(values, returns, mask) == pytest.approx(expected)
    assert explained_variance(returns, returns, mask) == 1
    assert math.isnan(explained_variance(values, torch.ones_like(returns), mask))


def test_kl_coefficient_adapts_to_the_target_and_is_constant_without_one():
    controller = KLController(0.1, target=6.0, horizon=1000)
    controller.update(kl=12.0, completions=100)  # error 1, clipped to 0.2
    assert controller.coefficient == pytest.approx(0.1 * 1.02)
    controller.update(kl=5.4, completions=100)
    assert controller.coefficient == pytest.approx(0.1 * 1.02 * 0.99)
    fixed = KLController(0.1)
    fixed.update(kl=100.0, completions=100)
    assert fixed.coefficient == 0.1


def test_scores_are_normalized_by_all_rollouts_or_by_the_first():
    scores = np.random.default_rng(0).normal(3.0, 2.0, size=(3, 20))
    running, initial = ScoreNormalizer(only_first=False), ScoreNormalizer(only_first=True)
    for batch in scores:
        for normalizer in (running, initial):
            normalizer.update(len(batch), batch.sum(), (batch**2).sum())
    x = torch.tensor([0.0, 5.0], dtype=torch.float64)
    np.testing.assert_allclose(running.normalize(x).numpy(), (x.numpy() - scores.mean()) / scores.std(), rtol=1e-6)
    first = scores[0]
    np.testing.assert_allclose(initial.normalize(x).numpy(), (x.numpy() - first.mean()) / first.std(), rtol=1e-6)
