import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, CompileConfig, ContinuousBatchingConfig, GenerationConfig, pipeline

PROMPT = {"pad_token_id": 0, "max_new_tokens": 6}


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prefill_chunk_size": 5},
    ],
    ids=[
        "greedy",
        "top-k",
        "top-p",
        "beam",
        "beam-sample",
        "no-cache",
        "prompt-lookup",
        "static-cache",
        "chunked-prefill",
    ],
)
def test_generation_modes(build, style, ids, mode):
    model = build(style)
    rows = 1 if "prompt_lookup_num_tokens" in mode else 2
    out = model.generate(ids[:rows], **PROMPT, **mode)
    assert out.shape == (rows * mode.get("num_return_sequences", 1), 18)
    assert torch.equal(out[:: mode.get("num_return_sequences", 1), :12], ids[:rows])


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_uncached_logits(build, style, ids):
    model = build(style)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(ids, do_sample=False, **PROMPT), expected)


def test_generation_with_a_static_cache_compiles_the_whole_forward(build, style, ids):
    model = build(style)
    torch.compiler.reset()
    counters.clear()
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)  # with fullgraph a break is an error
    compile_config._compile_all_devices = True  # on CPU, too
    out = model.generate(ids, do_sample=False, cache_implementation="static", compile_config=compile_config, **PROMPT)
    # one graph for all steps; the cache of a sliding window has a second one for when it is full
    assert counters["stats"]["unique_graphs"] == (2 if style == "mixture" else 1)
    assert torch.equal(out, model.generate(ids, do_sample=False, **PROMPT))


def test_left_padded_generation_equals_generation_alone(build, style, ids):
    model = build(style)
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat((padding, torch.ones_like(ids)), 1)
    padded = model.generate(torch.cat((padding, ids), 1), attention_mask=mask, do_sample=False, **PROMPT)
    assert torch.equal(padded[:, 3:], model.generate(ids, do_sample=False, **PROMPT))


def test_assisted_generation_equals_greedy(build, style, ids):
    model, assistant = build(style), build(style, num_hidden_layers=1, **_one_layer(style))
    greedy = model.generate(ids[:1], do_sample=False, **PROMPT)
    assert torch.equal(model.generate(ids[:1], do_sample=False, assistant_model=assistant, **PROMPT), greedy)


def test_continuous_batching_equals_generation_alone(build, style, ids):
    model = build(style)
    prompts = [*ids.tolist(), ids[0, :5].tolist()]
    answers = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64),
    )
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, **PROMPT)[0, len(prompt) :]
        assert answer.generated_tokens == alone.tolist()


@pytest.mark.parametrize("style", ["gpt2", "modern"])  # transformers quantizes full attention only
def test_a_quantized_cache_generates(build, style, ids):
    pytest.importorskip("optimum.quanto")
    out = build(style).generate(ids, do_sample=False, cache_implementation="quantized", **PROMPT)
    assert out.shape == (2, 18)


def test_the_text_generation_pipeline_writes_what_generate_does(build, style, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = build(style, vocab_size=len(tokenizer))
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("To be", max_new_tokens=6, do_sample=False)
    ids = tokenizer("To be", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert text[0]["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def _one_layer(style):
    if style != "mixture":
        return {}
    return {"no_rope_layer_interval": None, "layer_types": ["full_attention"], "sliding_window": None}
