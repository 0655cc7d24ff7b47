import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import (
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    QuantizedCache,
    pipeline,
)

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


def test_generation_with_a_static_cache_compiles_the_full_forward(build, style, ids):
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


@torch.no_grad()
@pytest.mark.parametrize("style", ["gpt2", "modern"])  # transformers quantizes full attention only
@pytest.mark.parametrize(
    ("backend", "package", "options"),
    [
        ("fp8", "torch", {}),
        # builds its kernels when it is first used, in minutes
        pytest.param("quanto", "optimum.quanto", {"q_group_size": 16}, marks=pytest.mark.slow),
        ("hqq", "hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16}),
    ],
    ids=["fp8", "quanto", "hqq"],
)
def test_a_quantized_cache_gives_nearly_the_same_logits(build, style, ids, backend, package, options):
    pytest.importorskip(package)
    model, options = build(style), {"backend": backend, **options}
    cache = QuantizedCache(config=model.config, **options)
    model(ids[:, :6], past_key_values=cache, use_cache=True)
    logits = model(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    exact = model(ids, use_cache=False).logits[:, 6:]
    assert not torch.equal(logits, exact)
    assert F.cosine_similarity(logits, exact, dim=-1).min() > 0.95
    generate = {"do_sample": False, "cache_implementation": "quantized", "cache_config": options}
    assert model.generate(ids, **generate, **PROMPT).shape == (2, 18)


@pytest.mark.parametrize("use_cache", [True, False])
def test_contrastive_search_finds_what_its_definition_asks_for(build, style, ids, use_cache):
    model = build(style)
    hidden_of, alpha, k = model.transformer, 0.6, 4
    expected = ids
    for _ in range(6):  # Su et al. 2022, eq. 3, by a full forward pass for every candidate
        with torch.no_grad():
            probabilities = model(expected, use_cache=False).logits[:, -1].softmax(-1)
            confidence, candidates = probabilities.topk(k)  # (batch, k)
            scores = []
            for candidate in candidates.split(1, dim=1):
                hidden = hidden_of(torch.cat((expected, candidate), 1), use_cache=False).last_hidden_state
                scores.append(F.cosine_similarity(hidden[:, :-1], hidden[:, -1:], dim=-1).max(-1).values)
        best = ((1 - alpha) * confidence - alpha * torch.stack(scores, 1)).argmax(1, keepdim=True)
        expected = torch.cat((expected, candidates.gather(1, best)), 1)
    options = {"penalty_alpha": alpha, "top_k": k, "use_cache": use_cache, **PROMPT}
    assert torch.equal(model.generate(ids, custom_generate=contrastive_search, **options), expected)


def contrastive_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Since transformers 5 contrastive search is a function that `generate` is given, here the shortest with a cache."""
    k, alpha, cache = generation_config.top_k, generation_config.penalty_alpha, model_kwargs.get("past_key_values")
    rows = torch.arange(input_ids.shape[0])
    run = {"output_hidden_states": True, "use_cache": cache is not None, "past_key_values": cache}
    outputs = model(input_ids, **run)
    logits, seen = outputs.logits[:, -1], outputs.hidden_states[-1]
    while True:
        confidence, candidates = logits.softmax(-1).topk(k)
        if cache is not None:
            cache.batch_repeat_interleave(k)
            outputs = model(candidates.view(-1, 1), **run)
        else:
            outputs = model(torch.cat((input_ids.repeat_interleave(k, 0), candidates.view(-1, 1)), 1), **run)
        hidden = outputs.hidden_states[-1][:, -1].unflatten(0, (-1, k))  # (batch, k, hidden)
        likeness = F.cosine_similarity(hidden[:, :, None], seen[:, None], dim=-1).amax(-1)
        best = ((1 - alpha) * confidence - alpha * likeness).argmax(1)
        if cache is not None:
            cache.batch_select_indices(rows * k + best)
        logits = outputs.logits[:, -1].unflatten(0, (-1, k))[rows, best]
        seen = torch.cat((seen, hidden[rows, best].unsqueeze(1)), 1)
        input_ids = torch.cat((input_ids, candidates[rows, best].unsqueeze(1)), 1)
        if stopping_criteria(input_ids, None).all():
            return input_ids


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
