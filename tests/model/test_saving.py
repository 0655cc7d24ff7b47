"""A saved directory loads anywhere, with its code and without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.auto import modeling_auto

from scratch_gpt.model import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)

HEADS = {
    AutoModel: ScratchGPTModel,
    AutoModelForCausalLM: ScratchGPTForCausalLM,
    AutoModelForSequenceClassification: ScratchGPTForSequenceClassification,
    AutoModelForTokenClassification: ScratchGPTForTokenClassification,
    AutoModelForQuestionAnswering: ScratchGPTForQuestionAnswering,
}

CODE = [f"{part}_scratch_gpt.py" for part in ("configuration", "modeling", "kernels", "loss")]


def test_tied_weights_are_stored_once_and_come_back_tied(build, tmp_path, ids):
    model = build("modern")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names and "transformer.wte.weight" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_untied_weights_stay_apart(build, tmp_path, ids):
    model = build("modern", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", "half on disk"])
def test_a_device_map_loads_the_same_model(build, tmp_path, style, ids, device_map):
    model = build(style)
    model.save_pretrained(tmp_path)
    if device_map == "half on disk":
        memory = {"cpu": model.get_memory_footprint() * 0.6}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        assert {"cpu", "disk"} == set(device_map.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    if device_map == "auto":
        loaded = loaded.to("cpu")
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **generate), model.generate(ids, **generate))


def test_a_checkpoint_loads_in_the_dtype_that_it_was_saved_in_unless_another_is_asked_for(build, style, tmp_path, ids):
    model = build(style).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and kept.config.dtype == torch.bfloat16
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and wide(ids).logits.dtype == torch.float32
    for a, b in zip(kept.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a.float(), b)
    if kept.config.position_embedding_type == "rope":  # angles are float32 all the same
        frequencies = kept.transformer.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32 and torch.equal(frequencies, wide.transformer.rotary_emb.inv_freq)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


Q_PROJ = "transformer.h.0.attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda weights: weights.pop(Q_PROJ), [f"lacks {Q_PROJ}"]),
        (lambda weights: weights.update({"x.weight": torch.ones(2)}), ["unknown x.weight"]),
        (lambda weights: weights.update({Q_PROJ + "s": weights.pop(Q_PROJ)}), [f"lacks {Q_PROJ}", Q_PROJ + "s"]),
        (lambda weights: weights.update({Q_PROJ: torch.ones(3, 3)}), [f"{Q_PROJ} is (3, 3), not (64, 32)"]),
        (lambda weights: weights.pop("lm_head.weight"), ["lacks lm_head.weight"]),
    ],
    ids=["missing", "extra", "misnamed", "shape", "head"],
)
@pytest.mark.parametrize("loader", [ScratchGPTForCausalLM, AutoModelForCausalLM])
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_names_of_its_weights(build, tmp_path, loader, edit, named):
    build("modern", tie_word_embeddings=False).save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError) as error:
        loader.from_pretrained(tmp_path)
    assert all(name in str(error.value) for name in [str(tmp_path), *named])


def test_a_state_dict_without_folder_may_lack_weights_which_are_initialized(build):
    model = build("modern")
    weights = model.state_dict()
    del weights[Q_PROJ]
    loaded = ScratchGPTForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    initialized = loaded.state_dict()[Q_PROJ]
    assert initialized.isfinite().all() and initialized.std() > 0
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_with_loading_info_missing_weights_are_reported(build, tmp_path):
    build("modern").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(Q_PROJ))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {Q_PROJ}
    edit_weights(tmp_path, lambda weights: weights.update({Q_PROJ: torch.ones(3, 3)}))
    AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loaded_as", HEADS.values())
@pytest.mark.parametrize("saved_as", HEADS.values())
def test_another_head_is_new_but_another_backbone_is_refused(build, tmp_path, saved_as, loaded_as, tied):
    saved = build("modern", saved_as, tie_word_embeddings=tied)
    saved.save_pretrained(tmp_path)
    loaded = loaded_as.from_pretrained(tmp_path)
    expected = saved.base_model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.base_model.state_dict().items())
    edit_weights(tmp_path, lambda weights: weights.pop(next(name for name in weights if name.endswith("ln_f.weight"))))
    with pytest.raises(ValueError, match=r"lacks (transformer\.)?ln_f\.weight"):
        loaded_as.from_pretrained(tmp_path)


def test_a_stored_head_that_equals_its_tied_embedding_is_no_error(build, tmp_path, ids):
    model = build("modern")
    model.save_pretrained(tmp_path)
    edit_weights(
        tmp_path, lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"].clone()})
    )
    loaded = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='gpt2', expected 'scratch_gpt'"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [ScratchGPTForCausalLM, AutoModelForCausalLM, AutoConfig])
def test_a_config_file_with_wrong_head_counts_is_refused_by_both(build, tmp_path, loader):
    build("modern").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="num_attention_heads=4 is not divisible by num_key_value_heads=3"):
        loader.from_pretrained(tmp_path)


def test_every_auto_class_loads_every_checkpoint(build, tmp_path):
    build("modern").save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ScratchGPTConfig
    for auto_class, model_class in HEADS.items():
        assert type(auto_class.from_pretrained(tmp_path)) is model_class


@pytest.mark.parametrize("model_class", HEADS.values())
def test_a_directory_names_the_code_of_every_head(build, tmp_path, model_class):
    build("modern", model_class).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *(auto_class.__name__ for auto_class in HEADS)}
    assert set(CODE) <= set(os.listdir(tmp_path))


def test_transformers_knows_the_class_names():
    # Trainer's label smoothing shifts the labels only for models that it finds in this table.
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["scratch_gpt"] == "ScratchGPTForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["scratch_gpt"] == "ScratchGPTModel"


RELOAD = """
import sys
sys.modules["scratch_gpt"] = None  # importing it raises ImportError
import peft, torch, transformers.modeling_utils  # peft loads stock models, which need the name deleted next
del transformers.modeling_utils.slice_logits_to_keep  # vLLM 0.33 needs transformers < 5.21, which lacks it
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
directory, again = sys.argv[1:]
ids = torch.arange(24).view(2, 12)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
torch.save(model(ids).logits, directory + "/logits.pt")
print(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape)
assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["scratch_gpt"] == type(model).__name__  # or label smoothing forgets the shift
assert type(AutoConfig.from_pretrained(directory, trust_remote_code=True)).__name__ == "ScratchGPTConfig"
for auto_class in (AutoModel, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
    loaded = auto_class.from_pretrained(directory, trust_remote_code=True)
    name = auto_class.__name__.replace("Auto", "ScratchGPT")
    assert type(loaded).__name__ == ("ScratchGPTModel" if auto_class is AutoModel else name.replace("GPTModel", "GPT"))
    loaded(ids)
reward = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True, num_labels=1)
reward.save_pretrained(again)  # what that process saves is complete, too
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
model.train()(ids, labels=ids).loss.backward()
from safetensors.torch import load_file, save_file
weights = load_file(directory + "/model.safetensors")
del weights["transformer.ln_f.weight"]
save_file(weights, directory + "/model.safetensors", metadata={"format": "pt"})
try:
    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
except ValueError as error:
    assert "lacks transformer.ln_f.weight" in str(error)
else:
    raise AssertionError("a checkpoint without the last norm was loaded")
"""


@pytest.mark.parametrize("style", ["gpt2", "mixture"])
def test_a_process_without_this_package_loads_uses_and_saves_the_model(build, tmp_path, style):
    model = build(style)
    model.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "again")],
        check=True,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    logits = torch.load(tmp_path / "saved" / "logits.pt")
    torch.testing.assert_close(logits, model(torch.arange(24).view(2, 12)).logits)
    assert set(CODE) <= set(os.listdir(tmp_path / "again"))


def test_resized_embeddings_work_and_stay_tied(build, ids):
    model = build("modern")
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.vocab_size == 120
    assert model(ids).logits.shape[-1] == 120
    assert model.train()(ids, labels=ids).logits is None  # the loss still needs no logits


def test_a_folder_with_an_adapter_loads_as_the_model_with_it(build, tmp_path, ids):
    from peft import LoraConfig, PeftModel, get_peft_model

    build("modern").save_pretrained(tmp_path / "base")
    base = ScratchGPTForCausalLM.from_pretrained(tmp_path / "base")
    lora = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path / "adapter")
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval(),
    ):
        torch.testing.assert_close(model(ids).logits, lora(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("style", ["gpt2", "modern"])
@pytest.mark.parametrize("bits", [4, 8])
def test_loaded_by_bitsandbytes_every_matrix_of_a_block_is_quantized(build, style, ids, tmp_path, monkeypatch, bits):
    functional = pytest.importorskip("bitsandbytes.functional")
    build(style).save_pretrained(tmp_path / "full")
    # Its own kernel for CPUs with AVX-512 takes matrices of 64 or more inputs only, and computes in bf16.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=how)
    matrices = {name: module.weight for name, module in model.named_modules() if name.endswith("_proj")}
    assert len(matrices) == model.config.num_hidden_layers * (7 if style == "modern" else 6)
    assert {weight.dtype for weight in matrices.values()} == {torch.uint8 if bits == 4 else torch.int8}
    assert model.lm_head.weight.dtype == torch.float32
    logits = model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    exact = plain(ids).logits
    assert not torch.allclose(logits, exact, atol=1e-4)
    if bits == 4:
        for name, weight in matrices.items():
            plain.get_submodule(name).weight.copy_(functional.dequantize_4bit(weight, weight.quant_state))
        assert torch.allclose(logits, plain(ids).logits, atol=1e-4)
    else:  # activations are rounded, too
        assert F.cosine_similarity(logits, exact, dim=-1).min() > 0.99
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(again(ids).logits, logits)
    assert again.generate(ids, do_sample=False, max_new_tokens=4).shape == (2, ids.shape[1] + 4)
