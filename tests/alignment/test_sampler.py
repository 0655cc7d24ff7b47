"""The data orders: each epoch complete, another order each epoch, the same for any number of ranks."""

import itertools

import pytest
from trl.trainer.utils import RepeatSampler

from scratch_gpt.alignment.sampler import RepeatingSampler, ResumableBatchSampler, RolloutSampler


def batches(rank=0, size=1, device_batch_size=6, accumulation=1, **changes):
    settings = {"num_samples": 15, "max_steps": 5, "seed": 1, **changes}
    sampler = ResumableBatchSampler(
        device_batch_size=device_batch_size,
        gradient_accumulation_steps=accumulation,
        dp_rank=rank,
        dp_size=size,
        **settings,
    )
    found = list(sampler)
    assert len(found) == len(sampler) == settings["max_steps"] * accumulation
    return found


def test_batch_sampler_yields_each_sample_once_per_epoch_in_another_order():
    stream = list(itertools.chain.from_iterable(batches()))  # two epochs of 15 in five steps of 6
    first, second = stream[:15], stream[15:]
    assert sorted(first) == sorted(second) == list(range(15)) and first != second
    assert stream != list(itertools.chain.from_iterable(batches(seed=2)))


@pytest.mark.parametrize(("size", "device_batch_size", "accumulation"), [(2, 3, 1), (1, 2, 3), (3, 1, 2)])
def test_batch_sampler_gives_a_step_the_same_samples_on_any_number_of_ranks(size, device_batch_size, accumulation):
    ranks = [batches(rank, size, device_batch_size, accumulation) for rank in range(size)]
    for step, expected in enumerate(batches()):
        micro_batches = [of_rank[step * accumulation :][:accumulation] for of_rank in ranks]
        together = [index for some in zip(*micro_batches, strict=True) for batch in some for index in batch]
        assert together == expected


def test_repeating_sampler_gives_each_epoch_all_prompts_in_another_order():
    one_epoch = RepeatSampler(range(10), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5)
    trls = list(one_epoch)
    sampler = RepeatingSampler(one_epoch, 3 * len(trls) - 1, 5)
    indices = list(sampler)
    assert indices == list(sampler) and len(indices) == len(sampler)
    epochs = [indices[start : start + len(trls)] for start in range(0, len(indices), len(trls))]
    assert epochs[0] == trls and epochs[0] != epochs[1] != epochs[2]
    assert all(len(set(epoch)) == 9 for epoch in epochs[:2])
    with pytest.raises(ValueError, match="2 prompts are fewer than the 3 of one batch"):
        RepeatingSampler(RepeatSampler(range(2), mini_repeat_count=2, batch_size=3, seed=5), 12, 5)


def test_rollout_sampler_shuffles_each_epoch_and_repeats_each_rollout():
    def prompts(epoch, rank):
        sampler = RolloutSampler(num_prompts=10, rollout_size=2, repeats=3, dp_rank=rank, dp_size=2, seed=1)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 2 * 3  # two rollouts of four prompts; two prompts are left over
        assert all(batches[i] == batches[i // 3 * 3] for i in range(6))
        return batches[0] + batches[3]

    first = prompts(0, 0) + prompts(0, 1)
    assert len(set(first)) == 8 and first == prompts(0, 0) + prompts(0, 1)
    assert first != prompts(1, 0) + prompts(1, 1)
    few = RolloutSampler(num_prompts=3, rollout_size=8, repeats=1, dp_rank=0, dp_size=1, seed=1)
    assert sorted(set(next(iter(few)))) == [0, 1, 2] and len(next(iter(few))) == 8
