"""The same tokens give the same logits with any cache, padding, packing and attention implementation."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scratch_gpt.model import (
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)


def assert_equal(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch.compiler.reset()


@torch.no_grad()
def test_eager_equals_sdpa(build, style, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for attention_mask in (None, mask):
        real = mask.bool() if attention_mask is not None else torch.ones_like(ids).bool()
        eager = build(style, attn="eager")(ids, attention_mask=attention_mask).logits[real]
        assert_equal(build(style, attn="sdpa")(ids, attention_mask=attention_mask).logits[real], eager)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_flex_attention_equals_sdpa(build, style, ids, stance):  # forward only: torch has no backward of it for CPU
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    calls = []

    def flex(module, query, key, value, attention_mask, **kwargs):
        calls.append(type(attention_mask).__name__)
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)

    sdpa = build(style)(ids, attention_mask=mask).logits
    model = build(style, attn="flex_attention")
    # By its definition, or by the kernel that takes half a minute to compile: the masks and arguments are the same.
    with torch.compiler.set_stance(stance), pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", flex)
        logits = model(ids, attention_mask=mask).logits
    assert calls == ["BlockMask"] * model.config.num_hidden_layers
    assert_equal(logits[mask.bool()], sdpa[mask.bool()])


def flash_batch(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """The definition of flash-attn for sequences (batch, seq, heads, head_dim); the last query aligns with the last key."""
    assert (dropout_p, softcap, causal) == (0.0, 0.0, True)
    behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash_packed(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """The definition of flash-attn for packed sequences (tokens, heads, head_dim)."""
    lengths = [cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), cu_seqlens_k.diff().tolist()]
    assert max(lengths[0]) == max_seqlen_q and max(lengths[1]) == max_seqlen_k
    pieces = zip(*(x.split(some) for x, some in zip((q, k, v), lengths, strict=True)), strict=True)
    options = (dropout_p, softmax_scale, causal, window_size, softcap)
    return torch.cat([flash_batch(*(x[None] for x in piece), *options)[0] for piece in pieces])


@torch.no_grad()
def test_flash_attention_kernels_get_the_right_arguments(build, style, ids, monkeypatch):
    """The kernel runs on GPUs only; everything that transformers and the model do around it runs here."""
    name, calls = "flash_attention_2", []

    def counted(kernel):
        @functools.wraps(kernel)
        def count(*arguments, **keywords):
            calls.append(kernel.__name__)
            return kernel(*arguments, **keywords)

        return count

    rows, pieces = counted(flash_batch), counted(flash_packed)
    for function, value in {
        "_flash_fn": rows,
        "_flash_varlen_fn": pieces,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(pieces),
        "_loaded_implementation": name,
    }.items():
        monkeypatch.setattr(flash_utils, function, value)
    sdpa, flash = build(style), build(style)
    flash.config._attn_implementation = name
    layers = sdpa.config.num_hidden_layers

    def same(kernel, real=..., **inputs):
        calls.clear()
        assert_equal(flash(**inputs).logits[real], sdpa(**inputs).logits[real])
        assert calls == [kernel] * layers

    same("flash_batch", input_ids=ids)
    for padding in (slice(0, 3), slice(-3, None)):
        mask = torch.ones_like(ids)
        mask[0, padding] = 0
        same("flash_packed", mask.bool(), input_ids=ids, attention_mask=mask)
    packed = torch.cat([torch.arange(4), torch.arange(ids.shape[1] - 4)])[None]
    same("flash_packed", input_ids=ids[:1], position_ids=packed, use_cache=False)
    cache = flash(ids[:, :-2], use_cache=True).past_key_values
    assert_equal(flash(ids[:, -2:], past_key_values=cache).logits, sdpa(ids).logits[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_decoding_with_a_cache_equals_decoding_without(build, style, attn, ids):
    model = build(style, attn=attn)
    full = model(ids, use_cache=False).logits
    cache, steps = DynamicCache(config=model.config), []
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    assert windows == ([5, None, 5] if style == "mixture" else [None] * 3)
    for part in (ids[:, :5], ids[:, 5:8], *ids[:, 8:].split(1, dim=1)):
        steps.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert_equal(torch.cat(steps, dim=1), full)


@torch.no_grad()
def test_static_cache_equals_dynamic_cache(build, style, ids):
    model = build(style)
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, **generate),
        model.generate(ids, cache_implementation="static", disable_compile=True, **generate),
    )
    static = StaticCache(config=model.config, max_cache_len=16)
    full = model(ids, use_cache=False).logits
    first = model(ids[:, :7], past_key_values=static, use_cache=True).logits
    assert_equal(first, full[:, :7])


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_left_right_and_no_padding_agree_at_real_tokens(build, style, attn, ids):
    model = build(style, attn=attn)
    alone = model(ids).logits
    padding, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)
    left = model(torch.cat((padding, ids), 1), attention_mask=torch.cat((padding, ones), 1)).logits[:, 3:]
    right = model(torch.cat((ids, padding), 1), attention_mask=torch.cat((ones, padding), 1)).logits[:, :-3]
    assert_equal(left, alone)
    assert_equal(right, alone)


@torch.no_grad()
def test_left_padded_decoding_with_a_cache_equals_no_padding(build, style, ids):
    model = build(style)
    alone = model(ids).logits
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat((padding, ids), 1), torch.cat((padding, torch.ones_like(ids)), 1)
    cache = DynamicCache(config=model.config)
    model(padded[:, :9], attention_mask=mask[:, :9], past_key_values=cache, use_cache=True)
    rest = model(padded[:, 9:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert_equal(rest, alone[:, 6:])


def packed_positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_packed_sequence_equals_its_documents_in_logits_and_gradients(build, style, attn):
    lengths = (7, 1, 9)
    ids = torch.randint(1, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    model = build(style, attn=attn).train()
    packed = model(ids, position_ids=packed_positions(*lengths)).logits
    separate = torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], dim=1)
    assert_equal(packed, separate)

    weights = torch.randn_like(packed)
    (packed * weights).sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (separate * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert_equal(packed_grads[name] / 100, parameter.grad / 100)


@torch.no_grad()
def test_packed_documents_do_not_attend_to_each_other_although_the_cache_is_on_by_default(build, style):
    ids = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(3))
    model = build(style)
    assert model.config.use_cache
    out = model(ids, position_ids=packed_positions(5, 7))
    assert out.past_key_values is None
    assert_equal(out.logits[:, 5:], model(ids[:, 5:]).logits)
    assert model(ids, position_ids=packed_positions(12)).past_key_values is not None
    assert model.train()(ids).past_key_values is None  # nor is a cache made in training


def test_gradient_checkpointing_with_dropout_gives_the_same_gradients(build, style, ids):
    model = build(style, attention_dropout=0.2, hidden_dropout=0.2, embedding_dropout=0.2).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(7)
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_equal(a, b)


def test_dropout_acts_in_training_only(build, style, ids):
    model = build(style, attention_dropout=0.3, hidden_dropout=0.3, embedding_dropout=0.3)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep(build, style, ids):
    model = build(style)
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    assert_equal(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert_equal(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])
    of_each_row = torch.tensor([[0, 4], [3, 1]])
    assert_equal(model(ids, logits_to_keep=of_each_row).logits, torch.stack([logits[0, [0, 4]], logits[1, [3, 1]]]))
    assert_equal(model(ids, logits_to_keep=ids > 40).logits, logits[ids > 40])


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded(build, style, ids):
    out = build(style, attn="eager")(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert out.attentions[0].shape == (2, 4, 12, 12)
    assert_equal(out.attentions[1].sum(-1), torch.ones(2, 4, 12))
    model = build(style, ScratchGPTModel)
    assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], model(ids).last_hidden_state)


@torch.no_grad()
def test_without_positions_the_order_of_earlier_tokens_does_not_matter(build, ids):
    swapped = ids.clone()
    swapped[:, [0, 1]] = ids[:, [1, 0]]
    shallow = {"num_hidden_layers": 1}
    nope = build("modern", position_embedding_type="none", **shallow)
    assert_equal(nope(ids).logits[:, 2:], nope(swapped).logits[:, 2:])
    rope = build("modern", **shallow)
    assert (rope(ids).logits - rope(swapped).logits)[:, 2:].abs().max() > 1e-2


@torch.no_grad()
def test_a_sliding_window_masks_earlier_tokens(build, ids):
    fields = {"layer_types": ["sliding_attention"], "sliding_window": 4, "num_hidden_layers": 1}
    model = build("modern", **fields)
    assert_equal(model(ids).logits[:, 8:], model(ids[:, 5:]).logits[:, 3:])


@torch.no_grad()
def test_logits_are_soft_capped(build, ids):
    model = build("modern")
    plain = model(ids).logits
    model.config.final_logit_softcapping = 2.0
    assert_equal(model(ids).logits, 2 * torch.tanh(plain / 2))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_bf16_autocast_stays_close_to_float32(build, style, attn, ids):
    model = build(style, attn=attn, initializer_range=0.05).train()
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert loss.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


def test_residual_projections_start_smaller(build):
    model = build("modern", hidden_size=256, num_hidden_layers=8, initializer_range=0.02, head_dim=64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / 4 if residual else 0.02  # sqrt(2 * 8) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_full_graph_compile_gives_the_same_logits(build, style, ids):
    model = build(style)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    assert_equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(graphs) == 1


def test_full_graph_compile_of_a_training_step(build, style, ids):
    model = build(style).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=ids).loss
    assert_equal(loss, model(ids, labels=ids).loss)
    loss.backward()
    compiled_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for a, p in zip(compiled_grads, model.parameters(), strict=True):
        assert_equal(a, p.grad, 1e-4)


def test_an_exported_model_takes_sequences_of_any_length(build, style, ids):
    model = build(style)
    any_length = {1: torch.export.Dim("seq", min=2, max=64)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exported = torch.export.export(
        model,
        (),
        {**inputs, "use_cache": False},
        dynamic_shapes={"input_ids": any_length, "attention_mask": any_length, "use_cache": None},
    ).module()
    for seq in (2, 12, 33, 64):
        longer = torch.arange(2 * seq).view(2, seq) % 97
        mask = torch.ones_like(longer)
        mask[1, : seq // 3] = 0  # padding on the left
        ours = exported(input_ids=longer, attention_mask=mask, use_cache=False).logits
        assert_equal(ours[mask == 1], model(longer, attention_mask=mask, use_cache=False).logits[mask == 1])


# --- bad input -------------------------------------------------------------------------------------------------------


def test_token_ids_outside_the_vocabulary_are_a_value_error(build, style, ids):
    ids[1, 3] = 97
    with pytest.raises(ValueError, match="input_ids range from .* to 97, but vocab_size=97"):
        build(style)(ids)


def test_a_sequence_longer_than_the_learned_positions_is_a_value_error(build):
    model, ids = build("gpt2"), torch.ones(1, 65, dtype=torch.long)
    for inputs in ({}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(65)[None]}):
        with pytest.raises(ValueError, match="65 tokens.*max_position_embeddings=64"):
            model(ids, **inputs)
    with pytest.raises(ValueError, match="65 tokens.*max_position_embeddings=64"):
        model.generate(ids[:, :60], max_new_tokens=10, do_sample=False, pad_token_id=0)
    build("modern")(ids)  # rotary positions have no limit


def test_an_attention_mask_of_another_shape_is_a_value_error(build, style, ids):
    for mask in (torch.ones(2, 11), torch.ones(3, 12)):
        with pytest.raises(ValueError, match="attention_mask has shape .*12"):
            build(style)(ids, attention_mask=mask)


def test_with_a_cache_the_attention_mask_covers_the_cached_tokens_too(build, style, ids):
    model = build(style)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 1\).*the cache holds 12 more"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


@pytest.mark.parametrize("label", [97, -1])
def test_labels_outside_the_vocabulary_are_a_value_error(build, style, ids, label):
    model, labels = build(style), ids.clone()
    labels[1, 3] = label
    for arguments in ({"labels": labels}, {"shift_labels": labels}, {"labels": labels, "skip_logits": True}):
        with pytest.raises(ValueError, match=f"labels hold {label}, but vocab_size=97.*-100"):
            model(ids, **arguments)


def test_labels_outside_the_classes_are_a_value_error(build, ids):
    labels = torch.full_like(ids, 3)
    for model_class, wrong in (
        (ScratchGPTForTokenClassification, labels),
        (ScratchGPTForSequenceClassification, labels[:, 0]),
    ):
        with pytest.raises(ValueError, match="labels hold 3, but num_labels=3"):
            build("modern", model_class, num_labels=3, pad_token_id=0)(ids, labels=wrong)


def test_exactly_one_input_is_needed(build, ids):
    model = build()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


# --- classification heads --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sequence_scores_are_read_at_the_last_real_token(build, style, ids):
    model = build(style, ScratchGPTForSequenceClassification, num_labels=1, pad_token_id=0)
    alone = model(ids).logits
    assert alone.shape == (2, 1)
    padding, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)
    for pads_left in (True, False):
        order = (lambda a, b: torch.cat((a, b), 1)) if pads_left else (lambda a, b: torch.cat((b, a), 1))
        assert_equal(model(order(padding, ids), attention_mask=order(padding, ones)).logits, alone)
    assert_equal(model(torch.cat((ids, padding), 1)).logits, alone)  # found by the padding token alone


@torch.no_grad()
def test_an_end_of_text_token_counts_even_where_it_is_the_padding_token(build, ids):
    ids[:, -1] = 5
    model = build("modern", ScratchGPTForSequenceClassification, num_labels=1, pad_token_id=5)
    expected = model.score(model.transformer(ids).last_hidden_state[:, -1])
    assert_equal(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)


def test_several_sequences_without_mask_or_pad_token_id_are_a_value_error(build, ids):
    with pytest.raises(ValueError, match="pad_token_id"):
        build("modern", ScratchGPTForSequenceClassification)(ids)


def test_classification_losses_reach_every_weight(build, style, ids):
    for model_class, labels in (
        (ScratchGPTForSequenceClassification, torch.tensor([0, 2])),
        (ScratchGPTForTokenClassification, torch.randint(0, 3, ids.shape)),
    ):
        model = build(style, model_class, num_labels=3, pad_token_id=0).train()
        model(ids, labels=labels).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_an_answer_is_scored_at_its_start_and_its_end(build, style, ids):
    model = build(style, ScratchGPTForQuestionAnswering).train()
    starts, ends = torch.tensor([1, 0]), torch.tensor([3, ids.shape[1]])  # the second answer ends beyond the text
    outputs = model(ids, start_positions=starts, end_positions=ends)
    hidden = model.transformer(ids).last_hidden_state
    scores = hidden @ model.qa_outputs.weight.T + model.qa_outputs.bias
    assert_equal(outputs.start_logits, scores[..., 0])
    assert_equal(outputs.end_logits, scores[..., 1])
    start_loss = -scores[..., 0].log_softmax(-1)[[0, 1], [1, 0]].mean()
    end_loss = -scores[0, :, 1].log_softmax(-1)[3]
    assert_equal(outputs.loss, (start_loss + end_loss) / 2)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_copied_model_is_independent(build, ids):
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert twin(ids).logits.abs().max() > 0


@torch.no_grad()
def test_a_registered_attention_function_gets_the_window_of_each_layer_and_the_callers_arguments(build, ids):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def recorder(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, kwargs["sliding_window"], kwargs["extra"], key.shape[1]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recorder", recorder)
    build("mixture", attn="recorder")(ids, extra="seen", use_cache=False)
    assert seen == [(0, 5, "seen", 1), (1, None, "seen", 1), (2, 5, "seen", 1)]
