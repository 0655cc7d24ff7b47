"""The loss that never holds all logits is the loss of the logits, in value and in gradients."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from scratch_gpt.model import loss_scratch_gpt
from scratch_gpt.model.loss_scratch_gpt import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 37, 16, 53


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[[0, 5, 36]] = -100
    labels[10:16] = -100  # an entire chunk of 5 without labels
    return hidden, weight, bias, labels


def reference(hidden, weight, bias, labels, num_items=None, softcap=None):
    logits = F.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 1000, None])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(20)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_loss_and_gradients_equal_cross_entropy(chunk_size, num_items, softcap):
    hidden, weight, bias, labels = problem()
    ours = linear_cross_entropy(hidden, weight, labels, bias, num_items, softcap=softcap, chunk_size=chunk_size)
    full = reference(hidden, weight, bias, labels, num_items, softcap)
    torch.testing.assert_close(ours, full)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (hidden, weight, bias)),
        torch.autograd.grad(3 * full, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_small_loss_under_large_logits_is_exact():
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 1000) + 40, torch.randint(0, 1000, (64,))
    logits[torch.arange(64), labels] += 10
    loss = linear_cross_entropy(logits, torch.eye(1000), labels)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=5e-8)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_inputs_that_need_no_gradient_get_none(frozen):
    hidden, weight, _, labels = problem()
    full_grads = torch.autograd.grad(reference(hidden, weight, None, labels), (hidden, weight))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    kept, expected = (hidden, full_grads[0]) if frozen == "weight" else (weight, full_grads[1])
    torch.testing.assert_close(kept.grad, expected, rtol=1e-5, atol=1e-6)
    assert (weight if frozen == "weight" else hidden).grad is None


def test_backward_twice_accumulates():
    hidden, weight, _, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    (loss / 2).backward(retain_graph=True)
    (loss / 2).backward()
    expected = torch.autograd.grad(reference(hidden, weight, None, labels), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_rows", [5, 4096])
def test_bfloat16_is_as_close_to_float32_as_the_full_logits_are(monkeypatch, head_rows):
    monkeypatch.setattr("scratch_gpt.model.loss_scratch_gpt.HEAD_ROWS_CPU", head_rows)
    hidden, weight, bias, labels = problem(torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    truth = torch.autograd.grad(reference(*exact, labels), exact)
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, bias, chunk_size=8), (hidden, weight, bias))
    full = torch.autograd.grad(reference(hidden, weight, bias, labels), (hidden, weight, bias))
    for a, b, t in zip(ours, full, truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - t).norm() <= 1.2 * (b.float() - t).norm() + 1e-3 * t.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float16_gradients_of_a_large_step_are_not_lost_before_the_loss_is_scaled(dtype):
    hidden, weight, bias, labels = problem()
    weight, bias = ((t.detach() / 4).to(dtype).requires_grad_() for t in (weight, bias))
    inputs = (hidden, weight, bias)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    tokens, scale = 2**24, 2.0**16
    truth = torch.autograd.grad(scale * reference(*exact, labels, tokens), exact)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels, bias, tokens, chunk_size=8)
    for ours, true in zip(torch.autograd.grad(scale * loss, inputs), truth, strict=True):
        assert (ours.float() - true).norm() < 2e-3 * true.norm()


def test_a_wrong_number_of_labels_is_a_value_error():
    hidden, weight, _, labels = problem()
    with pytest.raises(ValueError, match="37 hidden states, but 36 labels"):
        linear_cross_entropy(hidden, weight, labels[1:])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": torch.tensor(30)}, {"shift": True}])
def test_the_models_loss_without_logits_equals_its_loss_with_logits(build, style, ids, kwargs, autocast):
    model = build(style, initializer_range=0.05).train()
    labels = ids.clone()
    labels[0, :5] = -100
    kwargs = dict(kwargs)
    if kwargs.pop("shift", False):
        kwargs["shift_labels"] = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        labels = None
    results = []
    for skip_logits in (None, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(ids, labels=labels, skip_logits=skip_logits, **kwargs)
        assert (out.logits is None) == (skip_logits is None)
        out.loss.backward()
        results.append((out.loss, gradients(model)))
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    grad, expected = (torch.cat([grad.flatten() for grad in result[1].values()]) for result in results)
    assert (grad - expected).norm() <= tolerance * expected.norm()


def test_evaluation_returns_logits_by_default(build, ids):
    model = build()
    with torch.no_grad():
        full, skipped = model(ids, labels=ids), model(ids, labels=ids, skip_logits=True)
    assert full.logits.shape == (2, 12, 97) and skipped.logits is None
    torch.testing.assert_close(full.loss, skipped.loss)
    torch.testing.assert_close(full.loss, ForCausalLMLoss(full.logits, ids, vocab_size=97))


def test_gradient_accumulation_with_num_items_equals_one_batch(build, style, ids):
    model = build(style).train()
    labels = ids.clone()
    labels[0, :7] = -100
    items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels).loss.backward()
    full = gradients(model)
    model.zero_grad()
    for row in range(2):
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=items).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, full[name], rtol=1e-4, atol=1e-5)


def test_a_custom_loss_function_is_not_bypassed(build, ids):
    model = build().train()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 42.0
    assert model(ids, labels=ids).loss.item() == 42.0


def test_a_head_with_an_adapter_is_not_bypassed(build, ids):
    from peft import LoraConfig, get_peft_model

    model = build("modern", tie_word_embeddings=False)
    lora = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)).train()
    out = lora(input_ids=ids, labels=ids)
    with torch.no_grad():
        logits = lora(input_ids=ids).logits
    torch.testing.assert_close(out.loss, ForCausalLMLoss(logits, ids, vocab_size=97))


def test_a_training_step_never_makes_a_tensor_as_large_as_the_logits(build):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    vocabulary, tokens = 997, 16 * 64
    model = build("modern", vocab_size=vocabulary).train()
    ids = torch.randint(0, vocabulary, (16, 64))
    with Largest() as skipped:
        model(ids, labels=ids).loss.backward()
    with Largest() as full:
        model(ids, labels=ids, skip_logits=False).loss.backward()
    assert full.elements == vocabulary * tokens
    assert skipped.elements == vocabulary * tokens // 2  # two chunks of 512


class LigerByDefinition(torch.nn.Module):
    """The definition of liger-kernel's loss class, without its kernel."""

    def __init__(self, ignore_index, reduction, softcap, accum_dtype):
        super().__init__()
        assert (reduction, accum_dtype) == ("sum", torch.float32)
        self.ignore_index, self.softcap = ignore_index, softcap

    def forward(self, weight, hidden, target, bias=None):
        assert weight.dtype == hidden.dtype and (bias is None or bias.dtype == hidden.dtype)
        logits = F.linear(hidden, weight, bias).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum")


@pytest.mark.parametrize("num_items", [None, 11])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_liger_kernel_gets_the_arguments_that_it_needs(monkeypatch, num_items, softcap):
    hidden, weight, bias, labels = problem()
    expected = reference(hidden, weight, bias, labels, num_items, softcap)
    monkeypatch.setattr(loss_scratch_gpt, "_liger_kernel", lambda device: LigerByDefinition)
    padded = [torch.cat([tensor, torch.full_like(tensor[:7], 9.0)]) for tensor in (weight, bias)]
    arguments = {"num_items_in_batch": num_items, "softcap": softcap, "vocab_size": VOCABULARY}
    torch.testing.assert_close(linear_cross_entropy(hidden, padded[0], labels, padded[1], **arguments), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = linear_cross_entropy(hidden, padded[0], labels, padded[1], **arguments)
    torch.testing.assert_close(half, expected, rtol=3e-2, atol=3e-2)


LIGER_ITSELF = """
import itertools, sys, torch
sys.path.insert(0, {here!r})
from test_loss import VOCABULARY, loss_scratch_gpt, problem, reference
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

loss_scratch_gpt._liger_kernel = lambda device: LigerFusedLinearCrossEntropyLoss
for dtype, num_items, has_bias in itertools.product((torch.float32, torch.bfloat16), (None, 11), (True, False)):
    hidden, weight, bias, labels = problem(dtype)
    leaves = [hidden, weight, *([bias] if has_bias else [])]
    padded = [torch.cat([tensor, torch.full_like(tensor[:7], 9.0)]) for tensor in leaves[1:]]
    found = loss_scratch_gpt.linear_cross_entropy(
        hidden, padded[0], labels, *padded[1:], num_items_in_batch=num_items, vocab_size=VOCABULARY
    )
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = reference(*exact[:2], exact[2] if has_bias else None, labels, num_items)
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(found, expected, **tolerance)
    ours, full = torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, exact)
    for ours_one, full_one in zip(ours, full, strict=True):
        torch.testing.assert_close(ours_one.float(), full_one, **tolerance)
print("as the definition")
"""


def test_the_liger_kernel_itself_gives_the_loss_and_the_gradients():
    """In Triton's interpreter, which needs no GPU, but has no tanh for soft-capping. It must be chosen before the first import,
    so it has a process of its own."""
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install liger-kernel triton")
    script = LIGER_ITSELF.format(here=str(Path(__file__).parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "as the definition" in ended.stdout, ended.stderr


def test_without_cuda_there_is_no_liger_kernel():
    assert loss_scratch_gpt._liger_kernel(torch.device("cpu")) is None
