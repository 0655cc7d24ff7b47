"""A saved directory is all that anyone needs."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.auto import modeling_auto

from scratch_gpt.model import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)

HEADS = {
    AutoModel: ScratchGPTModel,
    AutoModelForCausalLM: ScratchGPTForCausalLM,
    AutoModelForSequenceClassification: ScratchGPTForSequenceClassification,
    AutoModelForTokenClassification: ScratchGPTForTokenClassification,
}


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
        room = {"cpu": model.get_memory_footprint() * 0.6}
        device_map = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
        assert {"cpu", "disk"} == set(device_map.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    if device_map == "auto":
        loaded = loaded.to("cpu")
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **generate), model.generate(ids, **generate))


def test_a_checkpoint_that_does_not_fit_is_reported_by_the_names_of_its_weights(build, tmp_path, caplog, monkeypatch):
    build("modern").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.q_prj.weight"] = weights.pop("transformer.h.0.attn.q_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    report = {
        line.split("|")[0].strip(): line.split("|")[1].strip() for line in caplog.text.splitlines() if "|" in line
    }
    assert report["transformer.h.0.attn.q_prj.weight"] == "UNEXPECTED"
    assert report["transformer.h.0.attn.q_proj.weight"] == "MISSING"

    weights["transformer.h.0.attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='gpt2', expected 'scratch_gpt'"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path)


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
    assert {"configuration_scratch_gpt.py", "modeling_scratch_gpt.py"} <= set(os.listdir(tmp_path))


def test_transformers_knows_the_class_names():
    # Trainer's label smoothing shifts the labels only for models that it finds in this table.
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["scratch_gpt"] == "ScratchGPTForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["scratch_gpt"] == "ScratchGPTModel"


STRANGER = """
import sys
sys.modules["scratch_gpt"] = None  # importing it raises ImportError
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
directory, again = sys.argv[1:]
ids = torch.arange(24).view(2, 12)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
torch.save(model(ids).logits, directory + "/logits.pt")
print(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape)
AutoModel.from_pretrained(directory, trust_remote_code=True)
reward = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True, num_labels=1)
reward.save_pretrained(again)  # and what a stranger saves is complete as well
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
model.train()(ids, labels=ids).loss.backward()
"""


@pytest.mark.parametrize("style", ["gpt2", "mixture"])
def test_a_process_without_this_package_loads_uses_and_saves_the_model(build, tmp_path, style):
    model = build(style)
    model.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "saved"), str(tmp_path / "again")],
        check=True,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    logits = torch.load(tmp_path / "saved" / "logits.pt")
    torch.testing.assert_close(logits, model(torch.arange(24).view(2, 12)).logits)
    assert "modeling_scratch_gpt.py" in os.listdir(tmp_path / "again")


def test_resized_embeddings_work_and_stay_tied(build, ids):
    model = build("modern")
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.vocab_size == 120
    assert model(ids).logits.shape[-1] == 120
    assert model.train()(ids, labels=ids).logits is None  # the loss still needs no logits


def test_lora_covers_every_projection_but_the_head(build, ids):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(build("modern"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name.split(".")[-2] for name, _ in lora.named_modules() if name.endswith(".lora_A")}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    lora.train()(input_ids=ids, labels=ids).loss.backward()
