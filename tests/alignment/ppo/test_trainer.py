"""PPOTrainer against independent computations of the same quantities, on a policy of a few thousand weights."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from scratch_gpt.alignment.ppo.config import PPOConfig
from scratch_gpt.alignment.ppo.rollout import completion_mask, generate
from tests.alignment.conftest import PROMPTS, fraction_of_w2

STYLES = {
    "rotary": {"num_key_value_heads": 1},
    "learned": {"position_embedding_type": "learned", "norm_type": "layernorm", "mlp_type": "plain", "qk_norm": False},
}


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(a, b, **tolerance):
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], **(tolerance or {"rtol": 0, "atol": 0}))


def training_log(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def record_rollouts(trainer):
    """Return a list to which the trainer's rollouts are added from now on."""
    rollouts, collect_rollout = [], trainer.collect_rollout

    def recording(examples):
        rollouts.append(collect_rollout(examples))
        return rollouts[-1]

    trainer.collect_rollout = recording
    return rollouts


# ---------------------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("style", list(STYLES))
def test_generation_log_probabilities_equal_training_log_probabilities(words, policy, trainer, style):
    """The loss sees the distribution that `generate` sampled from, with the cache and left padding."""
    tokenizer = words(20)
    model = policy(tokenizer, initializer_range=0.3, **STYLES[style])
    ppo = trainer(model, tokenizer, temperature=0.7)
    seen = {}
    own_generate = type(model).generate

    def spy(self, **arguments):
        out = own_generate(self, **arguments, output_logits=True, return_dict_in_generate=True)
        seen["logprobs"] = (torch.stack(out.logits, 1) / 0.7).log_softmax(-1)
        return out.sequences

    ppo.model.policy.generate = spy.__get__(ppo.model.policy)
    ppo.model.eval()
    scored = ppo.generate_and_score([ppo.train_dataset[i] for i in range(8)])
    batch, logprobs = scored.batch, scored.logprobs
    assert (batch.attention_mask[:, :4].sum(1) == torch.tensor([1, 2, 3, 4, 1, 2, 3, 4])).all()  # left-padded
    sampled = seen["logprobs"].gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    mask = batch.completion_mask.bool()
    torch.testing.assert_close(logprobs[mask], sampled[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored.ref_logprobs, logprobs, rtol=0, atol=1e-6)  # nothing is trained yet
    entropies = -(seen["logprobs"].exp() * seen["logprobs"]).sum(-1)
    torch.testing.assert_close(scored.entropies[mask], entropies[mask], rtol=1e-4, atol=1e-5)
    # and without cache, padding or other sequences in the batch
    ids = batch.sequences()[1]
    alone = (model(ids[None]).logits / 0.7).log_softmax(-1)[0, 1:-1].gather(-1, ids[2:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs[1][mask[1]], alone, rtol=1e-4, atol=1e-5)


def test_only_the_temperature_changes_the_sampling_distribution(words, policy):
    """A model's own generation settings are ignored: the log-probabilities that PPO compares do not have them."""
    tokenizer = words(20)
    model = policy(tokenizer)
    own = GenerationConfig(top_k=1, repetition_penalty=5.0, min_new_tokens=8, suppress_tokens=[3], max_length=2)
    model.generation_config = own
    torch.manual_seed(0)
    batch = generate(model, [[2, 3]] * 300, max_completion_length=8, temperature=1.0, stop_ids=[1], pad_id=0)
    assert model.generation_config is own
    ids, mask = batch.completion_ids, batch.completion_mask.bool()
    assert set(ids[mask].tolist()) == set(range(22))  # every token, including the suppressed one and the padding
    assert batch.ended.any() and int(batch.completion_mask.sum(1).min()) == 1


def test_completion_mask_ends_with_the_first_stop_token():
    ids = torch.tensor([[5, 1, 1, 1], [1, 5, 1, 0], [5, 6, 0, 7], [0, 0, 2, 1]])
    mask, ended = completion_mask(ids, [1, 2])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert ended.tolist() == [True, True, False, True]


def test_score_is_on_the_last_token_and_truncated_completions_are_penalized(words, policy, trainer):
    tokenizer = words(4)
    ppo = trainer(
        policy(tokenizer), tokenizer, lambda completions, **_: [2.0] * len(completions), missing_eos_penalty=0.5,
        gamma=0.9, lam=1.0, whiten_advantages=False, max_steps=1,
    )  # fmt: skip
    rollouts = record_rollouts(ppo)
    ppo.train()
    batch = rollouts[0].batch
    assert 0 < int(batch.ended.sum()) < 32
    for row in range(32):
        length = int(batch.completion_mask[row].sum())
        final = 2.0 if batch.ended[row] else 1.5
        expected = [
            final * 0.9 ** (length - 1 - t) for t in range(length)
        ]  # no KL penalty: the policy is the reference
        torch.testing.assert_close(rollouts[0].returns[row, :length], torch.tensor(expected), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- steps


def test_value_learning_rate_applies_to_the_value_model_alone(words, policy, trainer):
    tokenizer = words(8)
    size = {"per_device_train_batch_size": 6, "num_mini_batches": 1, "num_ppo_epochs": 1, "max_steps": 4}
    changed = []
    for rates in ({"learning_rate": 1e-3, "value_learning_rate": 4e-3}, {"learning_rate": 1e-3}):
        ppo = trainer(policy(tokenizer), tokenizer, **size, **rates)
        before = {name: parameter.detach().clone() for name, parameter in ppo.model.named_parameters()}
        ppo.create_optimizer()
        first = []
        ppo.optimizer.register_step_pre_hook(
            lambda optimizer, *_, ppo=ppo, first=first: first.append(
                {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            )
        )
        ppo.train()
        rate = {name: [step[id(parameter)] for step in first] for name, parameter in ppo.model.named_parameters()}
        fourth = [1e-3 * (1 - done / 4) for done in range(4)]
        assert rate["policy.transformer.wte.weight"] == pytest.approx(fourth)
        times = 4 if "value_learning_rate" in rates else 1
        assert rate["value_model.score.weight"] == pytest.approx([times * one for one in fourth])
        changed.append((ppo.model.value_model.score.weight - before["value_model.score.weight"]).abs().max().item())
    assert changed[0] > 2 * changed[1] > 0


def test_gradient_of_a_mini_batch_is_that_of_a_hand_written_loop(words, policy, trainer):
    """Two optimizer steps, against a loop over sequences and tokens without padding, masks or caches."""
    tokenizer = words(8)
    settings = {"kl_coef": 0.1, "vf_coef": 0.3, "max_grad_norm": 0.0, "lam": 0.9, "gamma": 0.97, "max_steps": 2}
    ppo = trainer(
        policy(tokenizer), tokenizer, per_device_train_batch_size=6, gradient_accumulation_steps=2, num_mini_batches=1,
        num_ppo_epochs=2, cliprange=0.05, cliprange_value=0.01, **settings,
    )  # fmt: skip
    with torch.no_grad():  # so that the KL penalty and the values are not 0
        for parameter in ppo.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rollouts = record_rollouts(ppo)
    models, gradients = [], []

    def record():
        gradients.append({name: p.grad.clone() for name, p in ppo.model.named_parameters()})
        models.append(copy.deepcopy(ppo.model))

    ppo.create_optimizer()
    ppo.optimizer.register_step_pre_hook(lambda *_: record())
    reference = copy.deepcopy(ppo.ref_model)
    ppo.train()
    assert len(rollouts) == 1 and len(gradients) == 2
    batch = rollouts[0].batch

    def tokens_of(model, ids, prompt):
        """Log-probabilities and values of one sequence without padding, excluding prompt tokens."""
        logits = model.policy(ids[None]).logits[0, prompt - 1 : -1]
        hidden = model.value_model.base_model(ids[None]).last_hidden_state[0, prompt - 1 : -1]
        return logits.log_softmax(-1)[range(len(ids) - prompt), ids[prompt:]], model.value_model.score(hidden)[:, 0]

    sequences = []
    with torch.no_grad():
        for ids, length in zip(batch.sequences(), batch.completion_mask.sum(1).tolist(), strict=True):
            prompt = len(ids) - length
            old, values = tokens_of(models[0], ids, prompt)
            ref = reference(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)[range(length), ids[prompt:]]
            rewards = -0.1 * (old - ref)
            rewards[-1] += tokenizer.decode(ids[prompt:], skip_special_tokens=True).split().count("w2") / 12
            advantages, next_advantage = [0.0] * length, 0.0
            for t in reversed(range(length)):
                delta = rewards[t] + (0.97 * values[t + 1] if t + 1 < length else 0) - values[t]
                next_advantage = advantages[t] = delta + 0.97 * 0.9 * next_advantage
            advantages = torch.tensor(advantages)
            sequences.append((ids, prompt, old, values, advantages, advantages + values))
    all_advantages = torch.cat([sequence[4] for sequence in sequences]).numpy()
    for step in (0, 1):
        model = models[step].train()
        model.zero_grad()
        total = 0.0
        for ids, prompt, old, old_values, advantages, returns in sequences:
            new, values = tokens_of(model, ids, prompt)
            for t in range(len(new)):
                advantage = float(advantages[t] - all_advantages.mean()) / math.sqrt(np.var(all_advantages) + 1e-8)
                ratio = torch.exp(new[t] - old[t])
                clipped = torch.clamp(ratio, 0.95, 1.05)
                near_old = old_values[t] + torch.clamp(values[t] - old_values[t], -0.01, 0.01)
                policy_loss = -torch.minimum(ratio * advantage, clipped * advantage)
                value_loss = 0.5 * torch.maximum((values[t] - returns[t]) ** 2, (near_old - returns[t]) ** 2)
                total = total + policy_loss + 0.3 * value_loss
        (total / len(all_advantages)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[step][name], parameter.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_first_mini_batch_has_ratio_1_and_each_rollout_is_used_for_num_ppo_epochs(words, policy, trainer):
    tokenizer = words(20)
    ppo = trainer(
        policy(tokenizer), tokenizer, num_ppo_epochs=3, num_mini_batches=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_steps=12, logging_steps=1,
    )  # fmt: skip
    rollouts = record_rollouts(ppo)
    used, compute_loss = [], ppo.compute_loss
    ppo.compute_loss = lambda model, inputs, **k: (
        used.append(inputs["indices"].tolist()) or compute_loss(model, inputs, **k)
    )
    ppo.train()
    assert len(rollouts) == 2 and len(used) == 24
    for rollout in (0, 1):
        for epoch in range(3):
            first = rollout * 12 + epoch * 4
            assert sorted(itertools.chain(*used[first : first + 4])) == list(range(16))
    assert used[0] != used[4]
    log = training_log(ppo)
    assert log[0]["policy/ratio"] == pytest.approx(1, abs=1e-5) and log[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert log[0]["policy/approx_kl"] == pytest.approx(0, abs=1e-6)


def test_gradient_accumulation_gives_the_step_of_the_full_mini_batch(words, policy, trainer):
    """With completions of different lengths: the loss is a mean over the tokens of the mini-batch."""
    tokenizer = words(6)
    results = []
    for size, accumulation in ((16, 1), (4, 4)):
        ppo = trainer(
            policy(tokenizer), tokenizer, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            max_steps=4, logging_steps=4,
        )  # fmt: skip
        ppo.train()
        results.append((weights(ppo.model), training_log(ppo)[-1]))
    assert_equal(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1]["loss/value"] == pytest.approx(results[1][1]["loss/value"], rel=1e-3)
    assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-3, abs=1e-6)


def test_a_constant_reward_does_not_change_the_policy(words, policy, trainer):
    tokenizer = words(20)
    ppo = trainer(policy(tokenizer), tokenizer, lambda completions, **_: [0.0] * len(completions), kl_coef=0.05)
    before = weights(ppo.model.policy)
    ppo.train()
    assert_equal(before, weights(ppo.model.policy), rtol=0, atol=1e-6)
    # any other constant neither, if scores are normalized
    normalized = trainer(
        policy(tokenizer), tokenizer, lambda completions, **_: [3.0] * len(completions), score_normalization="initial"
    )
    normalized.train()
    assert_equal(before, weights(normalized.model.policy), rtol=0, atol=1e-6)


def test_another_constant_changes_it_only_until_the_value_model_has_learned_it(words, policy, trainer):
    """Until then advantages depend on a token's position; afterwards the KL penalty restores the policy."""
    tokenizer = words(20)
    ppo = trainer(policy(tokenizer), tokenizer, lambda completions, **_: [1.0] * len(completions), max_steps=200)
    ppo.train()
    divergences = [entry["objective/kl"] for entry in training_log(ppo)]
    assert max(divergences) < 0.6  # nats in a completion of 12 tokens
    assert sum(divergences[-5:]) / 5 < 0.1


class RecordWeights(TrainerCallback):
    """Copies the weights after each optimizer step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states.append(weights(model))


def test_target_kl_stops_training_on_a_rollout_early(words, policy, trainer):
    tokenizer = words(20)
    recorder = RecordWeights()
    ppo = trainer(
        policy(tokenizer), tokenizer, target_kl=1e-3, learning_rate=1e-2, max_steps=16, logging_steps=1,
        arguments={"callbacks": [recorder]},
    )  # fmt: skip
    rollouts = record_rollouts(ppo)
    ppo.train()
    states = recorder.states
    assert len(rollouts) == 2
    log = training_log(ppo)
    stopped = next(i for i, entry in enumerate(log) if entry.get("policy/approx_kl", 0) > 1e-3)
    assert stopped < 7
    assert_equal(states[stopped], states[7])  # no weight changed, not even by the optimizer's momentum
    assert (
        states[8]["policy.lm_head.weight"].ne(states[7]["policy.lm_head.weight"]).any()
    )  # the next rollout changes them
    assert log[stopped]["policy/steps_per_rollout"] == stopped + 1


def test_resume_at_a_rollout_boundary_equals_the_uninterrupted_run(words, policy, trainer, tmp_path):
    """Also across an epoch of the data, including KL coefficient, score statistics and value model."""
    tokenizer = words(20)
    settings = {"adaptive_kl_target": 0.5, "adaptive_kl_horizon": 200, "score_normalization": "running"}
    settings |= {"max_steps": 32, "save_strategy": "steps", "save_steps": 11, "logging_steps": 8}
    full = trainer(policy(tokenizer), tokenizer, name="full", **settings)
    full.train()
    saved = sorted(int(folder.name.split("-")[1]) for folder in (tmp_path / "full").glob("checkpoint-*"))
    assert saved == [16, 24, 32]  # postponed from 11 and 22 to the ends of their rollouts
    for step in saved[:2]:  # within an epoch of two rollouts, and at its end
        resumed = trainer(policy(tokenizer, seed=9), tokenizer, name=f"from-{step}", **settings)
        resumed.ref_model.load_state_dict(full.ref_model.state_dict())
        resumed.train(resume_from_checkpoint=str(tmp_path / "full" / f"checkpoint-{step}"))
        assert_equal(weights(full.model), weights(resumed.model))
        assert resumed.kl_controller == full.kl_controller and resumed.normalizer == full.normalizer
        ignored = {"epoch", "step"}
        ours, theirs = training_log(resumed)[-1], training_log(full)[-1]
        assert {k: v for k, v in ours.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }


# ---------------------------------------------------------------------------------------------------- learning


def mean_length(completions, sign):
    return [sign * len(completion.split()) / 12 for completion in completions]


@pytest.mark.parametrize("sign", [1, -1], ids=["long", "short"])
def test_policy_learns_the_rewarded_length(words, policy, trainer, sign):
    """With the same token for padding and end of sequence, as in GPT-2: the end must still be learned."""
    tokenizer = words(8, pad_token="<eos>")
    ppo = trainer(
        policy(tokenizer), tokenizer, lambda completions, **_: mean_length(completions, sign),
        max_steps=96, learning_rate=3e-3, kl_coef=0.0, vf_coef=0.5,
    )  # fmt: skip
    ppo.train()
    first, last = training_log(ppo)[0], training_log(ppo)[-1]
    assert 4 < first["completions/mean_length"] < 9
    if sign == 1:
        assert last["completions/mean_length"] > 11 and last["completions/eos_share"] < 0.2
    else:
        assert last["completions/mean_length"] < 2 and last["completions/eos_share"] > 0.95


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_policy_learns_to_say_a_word_with_bounded_kl(words, policy, trainer, seed):
    """From chance (1/50) to 0.9 of the maximum; saying nothing else costs at most 12 ln 50 = 47 nats."""
    tokenizer = words(48)
    ppo = trainer(
        policy(tokenizer, seed), tokenizer, max_steps=240, learning_rate=4e-3, kl_coef=0.005, vf_coef=0.5, seed=seed
    )
    ppo.train()
    log = training_log(ppo)
    print([round(entry["objective/scores"], 3) for entry in log], log[-1]["objective/kl"])
    assert log[0]["objective/scores"] < 0.05
    assert log[-1]["objective/scores"] >= 0.9
    assert log[-1]["objective/kl"] < 45
    assert log[-1]["value/explained_variance"] > 0.5 or log[-1]["objective/scores_std"] < 0.02


# ---------------------------------------------------------------------------------------------------- models


def test_lora_trains_adapters_only_and_the_reference_is_the_model_without_them(words, policy, trainer, tmp_path):
    from peft import LoraConfig

    tokenizer = words(20)
    model = policy(tokenizer)
    base = weights(model)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ppo = trainer(
        model, tokenizer, arguments={"peft_config": lora}, max_steps=16, save_strategy="steps", save_steps=8,
        learning_rate=1e-2, logging_steps=8,
    )  # fmt: skip
    assert ppo.ref_model is None
    ppo.train()
    after = weights(ppo.model.policy.get_base_model())
    changed = [
        name
        for name, tensor in after.items()
        if not torch.equal(tensor, base.get(name.replace(".base_layer", ""), tensor))
    ]
    assert not changed
    assert training_log(ppo)[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(training_log(ppo)[-1]["objective/kl"]) > 1e-3
    saved = load_file(tmp_path / "run" / "checkpoint-16" / "adapter_model.safetensors")
    assert saved and all("lora" in name for name in saved)
    # a resumed run ends with the same weights
    resumed = trainer(
        policy(tokenizer), tokenizer, arguments={"peft_config": lora}, name="resumed", max_steps=16, learning_rate=1e-2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert_equal(weights(ppo.model), weights(resumed.model))


def test_reference_of_a_model_that_trl_has_trained_stays_frozen(words, policy, trainer):
    """TRL sets a `forward` on the model that, in a copy, still runs the weights of the original."""
    from trl.trainer.utils import add_fused_lm_head

    tokenizer = words(20)
    model = policy(tokenizer)
    add_fused_lm_head(model)
    assert "forward" in model.__dict__
    ids = torch.tensor([[2, 3, 4, 5]])
    ppo = trainer(model, tokenizer, max_steps=8, learning_rate=1e-2)
    before = ppo.ref_model(ids).logits.clone()
    ppo.train()
    assert torch.equal(ppo.ref_model(ids).logits, before)
    assert (model(ids).logits - before).abs().max() > 0.1


def test_reward_model_scores_token_ids_and_initializes_the_value_model(words, policy, classifier, trainer):
    tokenizer = words(20)
    reward_model = classifier(tokenizer)
    ppo = trainer(policy(tokenizer), tokenizer, reward_model, max_steps=8)
    assert_equal(weights(ppo.model.value_model), weights(reward_model))
    ppo.model.eval()
    scored = ppo.generate_and_score([ppo.train_dataset[i] for i in range(8)])
    batch, scores = scored.batch, scored.scores
    assert batch.ended.any() and not batch.ended.all()
    for row, ids in enumerate(batch.sequences()):
        assert (ids[-1] == tokenizer.eos_token_id) == batch.ended[row]
        torch.testing.assert_close(scores[row], reward_model(ids[None]).logits[0], rtol=1e-4, atol=1e-5)
    before = weights(reward_model)
    ppo.train()
    assert_equal(before, weights(reward_model))  # the reward model is frozen, the value model is not
    assert ppo.model.value_model.score.weight.ne(reward_model.score.weight).any()


def test_reward_model_with_another_tokenizer_scores_the_text(words, policy, classifier, trainer):
    tokenizer, other = words(20), words(30)
    other.add_tokens(["unrelated"])
    reward_model = classifier(other)
    ppo = trainer(
        policy(tokenizer), tokenizer, reward_model, arguments={"reward_processing_classes": other}, max_steps=8
    )
    assert not ppo.model.value_model.score.weight.any()  # a reward model with other tokens cannot initialize it
    ppo.model.eval()
    scored = ppo.generate_and_score([ppo.train_dataset[i] for i in range(8)])
    batch, scores = scored.batch, scored.scores
    for row, ids in enumerate(batch.sequences()):
        text = tokenizer.decode(ids, skip_special_tokens=True) + (" <eos>" if batch.ended[row] else "")
        expected = reward_model(torch.tensor([other(text).input_ids])).logits[0]
        torch.testing.assert_close(scores[row], expected, rtol=1e-4, atol=1e-5)
    ppo.train()


def test_several_rewards_are_weighted_and_get_the_columns(words, policy, trainer):
    tokenizer = words(20)
    data = Dataset.from_list([{**row, "wanted": f"w{i % 3}"} for i, row in enumerate(PROMPTS)])
    seen = []

    def wanted(prompts, completions, completion_ids, wanted):
        seen.append((prompts, completions, completion_ids, wanted))
        return torch.tensor([float(word in text.split()) for word, text in zip(wanted, completions, strict=True)])

    ppo = trainer(
        policy(tokenizer), tokenizer, [wanted, fraction_of_w2], dataset=data, reward_weights=[1.0, 3.0], max_steps=8
    )
    ppo.train()
    prompts, completions, ids, words_wanted = seen[0]
    assert len(prompts) == len(completions) == len(ids) == len(words_wanted) == 32
    assert {"prompt": prompts[0], "wanted": words_wanted[0]} in data.to_list()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == completions[0]
    log = training_log(ppo)[0]
    expected = log["rewards/0_wanted"] + 3 * log["rewards/1_fraction_of_w2"]
    assert log["objective/scores"] == pytest.approx(expected)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def test_conversations_end_at_the_chat_templates_end_of_turn(words, policy, trainer):
    """Also: bfloat16 autocast and activation checkpointing are in effect."""
    tokenizer = words(20)
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    tokenizer.add_tokens(["user", "assistant"])
    tokenizer.chat_template = TEMPLATE
    data = [{"prompt": [{"role": "user", "content": f"w{i} w1"}]} for i in range(20)]
    answers = []

    def reward(prompts, completions, **_):
        answers.extend(completions)
        return [float(len(c[0]["content"])) for c in completions]

    model = policy(tokenizer)
    ppo = trainer(
        model, tokenizer, reward, dataset=data, bf16=True, activation_checkpointing=True, max_steps=8, score_clip=1.0
    )
    assert set(ppo.stop_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")}
    dtypes = set()
    projection = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    projection.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    ppo.train()
    assert answers[0][0]["role"] == "assistant" and "<end>" not in answers[0][0]["content"]
    assert model.transformer.gradient_checkpointing
    assert torch.bfloat16 in dtypes
    assert ppo.model.policy.lm_head.weight.dtype == torch.float32


def test_saved_policy_is_a_plain_model_and_evaluation_does_not_change_training(words, policy, trainer, tmp_path):
    tokenizer = words(20)
    alone = trainer(policy(tokenizer), tokenizer, name="alone", max_steps=16)
    alone.train()
    watched = trainer(
        policy(tokenizer), tokenizer, arguments={"eval_dataset": Dataset.from_list(PROMPTS[:10])}, eval_strategy="steps",
        eval_steps=3, max_steps=16,
    )  # fmt: skip
    watched.train()
    assert_equal(weights(alone.model), weights(watched.model))
    evaluated = [entry for entry in watched.state.log_history if "eval_objective/scores" in entry]
    assert len(evaluated) >= 5 and evaluated[0]["eval_completions/mean_length"] > 1
    assert watched.evaluate() == watched.evaluate()

    watched.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal(weights(watched.model.policy), weights(saved))
    assert (tmp_path / "saved" / "tokenizer.json").is_file() and (
        tmp_path / "saved" / "modeling_scratch_gpt.py"
    ).is_file()


# ---------------------------------------------------------------------------------------------------- bad input


def raising(completions, **_):
    return [1 / 0 for _ in completions]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda completions, **_: [math.nan] * len(completions),
            r"returned nan, not a finite number, for the completion '.*' of the prompt",
        ),
        (lambda completions, **_: [None] * len(completions), "returned None, not a finite number, for the completion"),
        (lambda completions, **_: [1.0], "returned 1 scores for 32 completions"),
        (raising, r"raising raised ZeroDivisionError: division by zero \(.*test_trainer.py, line \d+\)"),
    ],
    ids=["nan", "none", "count", "raises"],
)
def test_a_failing_reward_is_named(words, policy, trainer, reward, message):
    tokenizer = words(20)
    with pytest.raises(ValueError, match=message):
        trainer(policy(tokenizer), tokenizer, reward).train()


def test_a_reward_model_that_returns_nan_is_named(words, policy, classifier, trainer):
    tokenizer = words(20)
    reward_model = classifier(tokenizer)
    torch.nn.init.constant_(reward_model.score.weight, math.nan)
    value_model = classifier(tokenizer)
    ppo = trainer(policy(tokenizer), tokenizer, reward_model, arguments={"value_model": value_model})
    with pytest.raises(ValueError, match="ScratchGPTForSequenceClassification returned nan"):
        ppo.train()


def test_data_and_models_that_do_not_fit_together_are_refused(words, policy, classifier, trainer, caplog):
    tokenizer = words(20)
    model = policy(tokenizer)

    def refused(message, *, reward=fraction_of_w2, dataset=PROMPTS, arguments=None, **settings):
        with pytest.raises(ValueError, match=message):
            trainer(policy(tokenizer), tokenizer, reward, dataset=dataset, arguments=arguments, **settings)

    refused("no column prompt, but text", dataset=[{"text": "w1"}])
    refused("the prompt of row 1 is empty", dataset=[{"prompt": "w1"}, {"prompt": ""}])
    refused("all 1 prompts are longer than 52 tokens", dataset=[{"prompt": "w1 " * 60}])
    refused("no chat template", dataset=[{"prompt": [{"role": "user", "content": "w1"}]}])
    refused("no token '<stop>'", stop_tokens=["<stop>"])
    refused("has one label, ScratchGPTForSequenceClassification has 2", reward=classifier(tokenizer, num_labels=2))
    refused("knows 10 tokens, the policy's tokenizer has 22", reward=classifier(words(8)))
    refused("fewer than the policy", arguments={"value_model": classifier(words(8))})
    refused("there are 1 rewards and 2 reward_weights", reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        trainer(model, tokenizer, arguments={"ref_model": model})
    kept = trainer(model, tokenizer, dataset=[{"prompt": "w1 " * 60}, {"prompt": "w1"}])
    assert len(kept.train_dataset) == 1


def test_a_message_cannot_contain_a_special_token(words, policy, trainer):
    tokenizer = words(20)
    tokenizer.chat_template = TEMPLATE
    data = [{"prompt": [{"role": "user", "content": "w1 <eos> w2"}]}]
    with pytest.raises(ValueError, match="special token <eos>"):
        trainer(policy(tokenizer), tokenizer, dataset=data)


def test_all_settings_out_of_range_are_named_in_one_message(tmp_path):
    with pytest.raises(ValueError, match=r"temperature is 0.*gamma is 2.*kl_estimator is 'k2'"):
        PPOConfig(output_dir=str(tmp_path), temperature=0, gamma=2.0, kl_estimator="k2")


def test_a_non_finite_loss_ends_the_run(words, policy, trainer):
    tokenizer = words(20)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        trainer(policy(tokenizer), tokenizer, learning_rate=1e30, max_grad_norm=0.0, max_steps=32).train()
