"""PEFT, TRL, Accelerate and vLLM find in the model what they need, under the names that they expect."""

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


def test_all_linear_lora_covers_every_projection_but_the_head(build, style, multiple, ids):
    from peft import LoraConfig, get_peft_model

    model = build(style, pad_vocab_size_multiple=multiple)
    lora = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = [name.split(".")[-2] for name, _ in lora.named_modules() if name.endswith(".lora_A")]
    assert set(adapted) == PROJECTIONS | ({"gate_proj"} if style != "gpt2" else set())
    assert len(adapted) == model.config.num_hidden_layers * len(set(adapted))
    lora.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in lora.named_parameters() if "lora_" in name)


def test_importing_the_package_installs_no_import_hook_and_does_not_import_peft():
    code = "import sys; import transformers; before = list(sys.meta_path); import scratch_gpt.model; "
    code += "assert sys.meta_path == before and 'peft' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_linear_lora_of_a_reward_model_trains_its_full_score_matrix(build, style):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    lora = get_peft_model(build(style, ScratchGPTForSequenceClassification), config)
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
            model.lm_head.weight[97:] = 9.0  # would change a loss that includes them
    labels = ids.clone()
    labels[0, :4] = -100
    expected = model(ids, labels=labels, skip_logits=False).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    add_fused_lm_head(model)
    actual = model(ids, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(actual, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # outside of forward, Accelerate finds the modules that hold the parameters, so that it can shard them together
    assert model.get_output_embeddings() is model.lm_head
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


# --- vLLM's transformers backend -----------------------------------------------------------------------


class _OneModule(fx.Tracer):
    """Trace the forward of one module only; submodules stay calls."""

    def is_leaf_module(self, module, name) -> bool:
        return True


def test_vllm_recognizes_by_tracing_the_modules_that_it_has_kernels_for(build):
    """It traces on CPU with gradients enabled, and rewrites the source, in which each submodule may be called only once."""
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

    for module, names in (
        (block.mlp, ("gate_proj", "up_proj", "act_fn")),
        (block.attn, ("q_proj", "k_proj", "v_proj")),
    ):
        source = inspect.getsource(type(module).forward)
        assert [source.count(f"self.{name}") for name in names] == [1, 1, 1]


@torch.no_grad()
def test_a_server_with_its_own_attention_runs_the_backbone_over_many_requests_in_one_sequence(build, style):
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


def test_parallel_plans_name_linear_layers_and_the_children_in_order(build, style):
    model = build(style).transformer
    for rule, how in model.config.base_model_tp_plan.items():
        module = model.get_submodule(rule.replace("*", "0"))
        if how in ("colwise", "rowwise"):
            assert isinstance(module, nn.Linear), rule
    if (plan := model.config.base_model_pp_plan) is not None:
        children = [name for name, _ in model.named_children()]
        assert sorted(plan, key=children.index) == list(plan)
        assert [name for name in plan if isinstance(model.get_submodule(name), nn.ModuleList)] == ["h"]
