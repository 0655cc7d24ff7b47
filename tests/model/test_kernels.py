"""Every fast path is taken where it should be, and computes its plain definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scratch_gpt.model import kernels_scratch_gpt as kernels
from scratch_gpt.model import modeling_scratch_gpt as modeling
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTGELU, ScratchGPTLinear, ScratchGPTRMSNorm


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch.compiler.reset()


@pytest.fixture
def calls(monkeypatch):
    """Names of the fast paths that the model takes, in order."""
    names = []

    def record(choose):
        def choose_and_record(*arguments):
            chosen = choose(*arguments)
            if chosen is not None:
                names.append(chosen.__name__)
            return chosen

        return choose_and_record

    for name in ("choose_rms_norm", "choose_linear", "choose_attention", "choose_gelu"):
        monkeypatch.setattr(modeling, name, record(getattr(kernels, name)))
    return names


def compiled_graphs(module):
    """The module compiled without gaps, and the list that its graphs are appended to."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(module, backend=keep, fullgraph=True), graphs


def assert_equal(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- RMSNorm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 3, 24)])
def test_cpu_rms_norm_and_its_gradients_equal_the_definition(calls, dtype, shape):
    torch.manual_seed(0)
    norm = ScratchGPTRMSNorm(24, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24))
    x, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    exact = x.detach().float().requires_grad_()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    result = norm(x)
    assert calls == ["cpu_rms_norm"] and result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_equal(result.float(), expected, tolerance)
    ours = torch.autograd.grad(result, (x, norm.weight), grad)
    for got, want in zip(ours, torch.autograd.grad(expected, (exact, norm.weight), grad.float()), strict=True):
        assert_equal(got.float(), want, tolerance)


def test_without_gradients_rms_norm_is_torchs(calls):
    norm, x = ScratchGPTRMSNorm(24, eps=1e-3), torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-3))
    assert calls == []


# --- linear --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_few_rows_without_gradients_equal_nn_linear(monkeypatch, calls, bias, rows):
    monkeypatch.setattr(kernels, "FEW_ROWS_ARE_SLOW", True)
    monkeypatch.setattr(kernels, "MIN_ONEDNN_OUTPUTS", 33)
    torch.manual_seed(0)
    linear, x = ScratchGPTLinear(48, 33, bias=bias), torch.randn(1, rows, 48)
    expected = F.linear(x, linear.weight, linear.bias)
    with torch.no_grad():
        assert_equal(linear(x), expected.detach())
        assert calls == (["onednn_linear"] if rows <= 8 else [])
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        monkeypatch.setattr(kernels, "MIN_ONEDNN_OUTPUTS", 34)
        linear(x)
    linear(x)
    assert calls == []


@torch.no_grad()
def test_a_compiled_decoding_step_multiplies_matrix_and_vector_and_gives_the_same(build, style, monkeypatch):
    monkeypatch.setattr(kernels, "FEW_ROWS_ARE_SLOW", True)
    model, ids = build(style), torch.tensor([[7]])
    compiled, graphs = compiled_graphs(model)
    assert_equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    products = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.mv]
    assert len(products) == sum(isinstance(module, ScratchGPTLinear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_adds_the_bias_with_the_gradients_of_nn_linear(dtype):
    torch.manual_seed(0)
    linear = ScratchGPTLinear(48, 33).to(dtype)
    x, grad = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True), torch.randn(2, 5, 33, dtype=dtype)
    leaves = (x, linear.weight, linear.bias)
    compiled, graphs = compiled_graphs(linear)
    result, expected = compiled(x), F.linear(*leaves)
    assert any("autograd_function_apply" in node.name for graph in graphs for node in graph.graph.nodes)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_equal(result, expected, tolerance)
    gradients_of_both = (torch.autograd.grad(output, leaves, grad) for output in (result, expected))
    for got, want in zip(*gradients_of_both, strict=True):
        assert_equal(got, want, tolerance)


# --- attention -----------------------------------------------------------------------------------------------------------


def test_short_bf16_attention_equals_sdpa(build, style, ids, calls, monkeypatch):
    model = build(style, initializer_range=0.05).to(torch.bfloat16).train()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for attention_mask in (None, mask):
        real = mask.bool() if attention_mask is not None else torch.ones_like(ids).bool()
        calls.clear()
        ours = model(ids, attention_mask=attention_mask).logits[real].float()
        assert calls.count("short_bf16_attention") == model.config.num_hidden_layers
        with monkeypatch.context() as patch:
            patch.setattr(modeling, "choose_attention", lambda *_: None)
            sdpa = model(ids, attention_mask=attention_mask).logits[real].float()
        assert not torch.equal(ours, sdpa)
        torch.testing.assert_close(ours, sdpa, rtol=0.1, atol=0.05 * sdpa.std().item())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("seq", "kv_seq"), [(1, 1), (7, 7), (3, 9)])
@pytest.mark.parametrize("groups", [1, 2])
def test_short_attention_and_its_gradients_equal_the_definition(seq, kv_seq, groups, masked):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = groups
    heads = [
        torch.randn(2, n, s, 16, requires_grad=True)
        for n, s in ((4, seq), (4 // groups, kv_seq), (4 // groups, kv_seq))
    ]
    causal = torch.ones(seq, kv_seq, dtype=torch.bool).tril(kv_seq - seq)
    if masked and kv_seq > 1:
        causal[:, 0] = False
        causal[0, kv_seq - seq] = True  # every query attends to something
    mask = causal[None, None] if masked else None
    ours = kernels.short_bf16_attention(module, *heads, mask, scaling=0.3)[0]
    additive = torch.zeros(seq, kv_seq).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = modeling.eager_attention_forward(module, *heads, additive, scaling=0.3)[0]
    assert_equal(ours, expected)
    grad = torch.randn_like(ours)
    gradients_of_both = (torch.autograd.grad(output, heads, grad) for output in (ours, expected))
    for got, want in zip(*gradients_of_both, strict=True):
        assert_equal(got, want)


def test_sequences_beyond_the_limit_take_sdpa(build, calls):
    limit = kernels.MAX_SHORT_ATTENTION
    model = build("modern", max_position_embeddings=300, num_hidden_layers=1).to(torch.bfloat16).train()
    for seq, taken in ((limit, 1), (limit + 1, 0)):
        calls.clear()
        model(torch.ones(1, seq, dtype=torch.long))
        assert calls.count("short_bf16_attention") == taken


@pytest.mark.parametrize("seq", [1, 128, 130, 600])
@pytest.mark.parametrize("groups", [1, 3])
def test_blockwise_attention_and_its_gradients_equal_sdpa(seq, groups):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = groups, True, True
    heads = [torch.randn(2, n, seq, 16, requires_grad=True) for n in (3, 3 // groups, 3 // groups)]
    grad = torch.randn(2, seq, 3, 16)
    ours = kernels.blockwise_bf16_attention(module, *heads, None, scaling=0.3)[0]
    sdpa = sdpa_attention_forward(module, *heads, None, scaling=0.3)[0]
    assert_equal(ours, sdpa)
    for got, want in zip(*(torch.autograd.grad(output, heads, grad) for output in (ours, sdpa)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def gradients(forward, model, ids):
    model.zero_grad()
    forward(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def node_names(graph):
    return {node.name for module in graph.modules() if hasattr(module, "graph") for node in module.graph.nodes}


def test_compiled_bf16_training_takes_blockwise_attention(build, style):
    model, graphs = build(style, max_position_embeddings=300, initializer_range=0.05).train(), []
    ids = torch.randint(0, model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(3))

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    exact = gradients(model, model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients(model, model, ids)
        compiled = gradients(torch.compile(model, backend=keep), model, ids)
    names = {name for graph in graphs for name in node_names(graph)}
    assert any("autograd_function_apply" in name for name in names)
    assert not any("scaled_dot_product" in name for name in names)
    for name, expected in exact.items():
        error = [(grads[name] - expected).norm() / expected.norm() for grads in (eager, compiled)]
        assert error[1] < 3 * error[0] + 1e-3, name  # the mean of grad * output, not weights * grad_weights: 7 times


def test_compiled_bf16_training_on_a_cache_attends_to_cached_tokens(build):
    model = build("modern", initializer_range=0.05).to(torch.bfloat16).train()
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    compiled = torch.compile(model, backend="eager")
    cache = DynamicCache(config=model.config)
    model(ids[:, :11], past_key_values=cache, use_cache=True)
    logits = compiled(ids[:, 11:], past_key_values=cache, use_cache=True).logits
    expected = model(ids).logits[:, 11:]
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_compiled_training_has_the_gradients_of_eager_training(build, style, ids):
    model = build(style, initializer_range=0.05).train()
    eager, compiled = (gradients(one, model, ids) for one in (model, torch.compile(model, backend="aot_eager")))
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-4, atol=1e-6, msg=name)


# --- GELU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gelu_is_a_sigmoid_and_equals_the_definition(dtype):
    x = torch.linspace(-12, 12, 1001).to(dtype).requires_grad_()
    compiled, graphs = compiled_graphs(ScratchGPTGELU())
    exact = x.detach().float().requires_grad_()
    expected = 0.5 * exact * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))
    result = compiled(x)
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert torch.sigmoid in targets and result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_equal(result.float(), expected, tolerance)
    ours = torch.autograd.grad(result.sum(), x)[0]
    assert_equal(ours.float(), torch.autograd.grad(expected.sum(), exact)[0], tolerance)
