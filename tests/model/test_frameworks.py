"""What PEFT, TRL, Accelerate and vLLM ask of a model is there, under the names that they ask for."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers import AttentionInterface, AutoModel

from scratch_gpt.model import ScratchGPTForSequenceClassification


@pytest.fixture(params=[1, 64], ids=["", "padded"])
def multiple(request) -> int:
    """As `pad_vocab_size_multiple`: with 64, embedding and head have 128 rows for 97 tokens."""
    return request.param


# --- PEFT ------------------------------------------------------------------------------------------------------------

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_covers_every_projection_but_the_head(build, style, multiple, ids, targets):
    from peft import LoraConfig, get_peft_model

    model = build(style, pad_vocab_size_multiple=multiple)
    lora = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    adapted = [name.split(".")[-2] for name, _ in lora.named_modules() if name.endswith(".lora_A")]
    assert set(adapted) == PROJECTIONS | ({"gate_proj"} if style != "gpt2" else set())
    assert len(adapted) == model.config.num_hidden_layers * len(set(adapted))
    lora.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in lora.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("first", ["scratch_gpt", "peft"])
def test_peft_waits_until_it_is_needed_and_then_knows_what_to_adapt(first):
    code = f"""
import sys
import {first}
assert ("peft" in sys.modules) == ({first!r} == "peft")
import scratch_gpt, peft
print(*peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["scratch_gpt"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == PROJECTIONS | {"gate_proj"}, done.stderr


def test_lora_of_a_reward_model_leaves_its_score_to_be_trained_whole(build, style):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(build(style, ScratchGPTForSequenceClassification), LoraConfig(task_type="SEQ_CLS"))
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_trls_fused_head_gives_the_loss_and_the_gradients_of_the_model(build, style, multiple, ids):
    from trl.trainer.utils import add_fused_lm_head

    model = build(style, pad_vocab_size_multiple=multiple)
    if multiple > 1:
        with torch.no_grad():
            model.lm_head.weight[97:] = 9.0  # would be seen in a loss that they are part of
    labels = ids.clone()
    labels[0, :4] = -100
    expected = model(ids, labels=labels, skip_logits=False).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    add_fused_lm_head(model)
    actual = model(ids, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(actual, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # from outside, Accelerate finds the very modules that hold the parameters, so that it can shard them together
    assert model.get_output_embeddings() is model.lm_head
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


# --- vLLM's backend for models of transformers -----------------------------------------------------------------------


class _OneModule(fx.Tracer):
    """Traces the forward of one module; what it calls stays a call."""

    def is_leaf_module(self, module, name) -> bool:
        return True


def test_a_server_that_traces_the_parts_recognises_what_it_has_kernels_for(build):
    """It asks with gradients enabled, on the CPU, and rewrites the source, where a part may be called only once."""
    block = build("modern").transformer.h[0]
    assert torch.is_grad_enabled()

    for norm in (block.ln_1, block.attn.q_norm):
        (root_mean_square,) = (node for node in _OneModule().trace(norm).nodes if node.target is F.rms_norm)
        assert root_mean_square.args[0].op == "placeholder" and root_mean_square.kwargs["eps"] == norm.eps
        assert [user.op for user in root_mean_square.users] == ["output"]

    mlp = {str(node.target): node for node in _OneModule().trace(block.mlp).nodes}
    (product,) = mlp["up_proj"].users
    assert product.args == (mlp["act_fn"], mlp["up_proj"]) and mlp["act_fn"].args == (mlp["gate_proj"],)
    assert mlp["gate_proj"].args == mlp["up_proj"].args and mlp["down_proj"].args == (product,)

    for part, names in ((block.mlp, ("gate_proj", "up_proj", "act_fn")), (block.attn, ("q_proj", "k_proj", "v_proj"))):
        source = inspect.getsource(type(part).forward)
        assert [source.count(f"self.{name}") for name in names] == [1, 1, 1]


@torch.no_grad()
def test_a_server_with_attention_of_its_own_runs_the_backbone_over_many_requests_in_one_row(build, style):
    lengths = (7, 1, 9)
    requests = torch.randint(1, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(3)).split(lengths, 1)
    model = build(style)
    expected = torch.cat([model.transformer(request).last_hidden_state for request in requests], 1)

    def served(module, query, key, value, attention_mask, scaling, attention_instances, **kwargs):
        assert attention_mask is None and module.is_causal
        outputs = []
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
            position = torch.arange(q.shape[2])
            distance = position[:, None] - position
            seen = (distance >= 0) & (distance < (attention_instances[module.layer_idx] or 10**9))
            outputs.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True))
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1), None  # (tokens, heads * head_dim)

    AttentionInterface.register("served", served)
    config = model.config
    config._attn_implementation = "served"
    backbone = AutoModel.from_config(config).eval()
    assert "AutoModel" in config.auto_map and backbone._supports_attention_backend
    backbone.load_state_dict(model.transformer.state_dict())
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    outputs = backbone(
        input_ids=torch.cat(requests, 1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        use_cache=False,
        attention_instances=[windows[layer_type] for layer_type in config.layer_types],
        return_dict=False,
    )
    assert len(outputs) == 1  # no cache
    torch.testing.assert_close(outputs[0], expected, rtol=2e-5, atol=2e-5)


def test_the_plans_of_a_server_name_plain_matrices_and_the_parts_in_their_order(build, style):
    model = build(style).transformer
    for rule, how in model.config.base_model_tp_plan.items():
        module = model.get_submodule(rule.replace("*", "0"))
        if how in ("colwise", "rowwise"):
            assert isinstance(module, nn.Linear), rule
    if (plan := model.config.base_model_pp_plan) is not None:
        children = [name for name, _ in model.named_children()]
        assert sorted(plan, key=children.index) == list(plan)
        assert [name for name in plan if isinstance(model.get_submodule(name), nn.ModuleList)] == ["h"]
