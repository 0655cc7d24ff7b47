"""Sequences sharded over ranks give the losses and gradients of full sequences."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scratch_gpt.data.batches import Batch
from scratch_gpt.distributed.context_parallel import (
    ATTENTION,
    apply_context_parallel,
    check_context_length,
    local_positions,
    shard_batch,
)
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.model.conftest import SIZE, STYLES

WORLD_SIZE, LENGTH = 3, 24
IDS = torch.randint(1, SIZE["vocab_size"], (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.stack(  # positions; documents do not end where chunks do, which are 4 tokens long
    [torch.cat([torch.arange(count) for count in counts]) for counts in ((5, 6, 13), (1, 20, 3))]
)
BATCHES = {
    "one document": Batch(IDS[:, :-1], IDS[:, 1:]),
    "packed documents": Batch(IDS[:, :-1], IDS[:, 1:], DOCUMENTS),
}

ODD = LENGTH - 1  # a length that is not divisible
PADDING = torch.arange(ODD)
INSIDE = {
    "full": {},
    "right padding": {"attention_mask": (PADDING < torch.tensor([[ODD], [9]])).long()},
    "left padding": {"attention_mask": (PADDING >= torch.tensor([[0], [14]])).bool()},
    "packed documents": {"position_ids": DOCUMENTS[:, :ODD]},
}


def build(style):
    torch.manual_seed(0)
    return ScratchGPTForCausalLM(ScratchGPTConfig(**{**SIZE, **STYLES[style]})).train()


def loss_and_gradients(model, batch, attention_mask=None):
    outputs = model(
        batch.input_ids,
        attention_mask=attention_mask,
        position_ids=batch.position_ids,
        shift_labels=batch.targets,
        num_items_in_batch=IDS.numel() - 2,
    )
    outputs.loss.backward()
    return outputs.loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def real_logits_and_gradients(model, given):
    """Return outputs and gradients of a loss on tokens that follow a token and are, like it, not padding."""
    mask = given.get("attention_mask", torch.ones(2, ODD)).bool()
    is_target = mask & mask.roll(1, dims=1)
    outputs = model(IDS[:, :ODD], labels=IDS[:, :ODD].where(is_target, -100), skip_logits=False, **given)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": outputs.logits.detach()[mask], "loss": outputs.loss.detach()}, gradients


def generate(model):
    return model.eval().generate(IDS[:, :5], max_new_tokens=8, do_sample=False)


def work(rank, folder, store_file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_file, WORLD_SIZE), rank=rank, world_size=WORLD_SIZE)
    for style in STYLES:
        for name, batch in BATCHES.items():
            model = build(style)
            model.set_attn_implementation(ATTENTION)
            local, shards = shard_batch(batch, model.config, dist.group.WORLD)
            loss, gradients = loss_and_gradients(model, local, shards)
            for tensor in (loss, *gradients.values()):
                dist.all_reduce(tensor)
            torch.save((local.input_ids, loss, gradients), folder / f"{style} {name} {rank}.pt")
        for name, given in INSIDE.items():
            model = build(style)
            model.set_attn_implementation(ATTENTION)
            lengths = []
            model.transformer.h[0].register_forward_pre_hook(
                lambda _, inputs, to=lengths: to.append(inputs[0].shape[1])
            )
            apply_context_parallel(model.transformer, dist.group.WORLD)
            outputs, gradients = real_logits_and_gradients(model, given)
            assert lengths == [LENGTH // WORLD_SIZE]
            for tensor in gradients.values():
                dist.all_reduce(tensor.div_(WORLD_SIZE))
            torch.save((outputs, gradients, generate(model)), folder / f"inside {style} {name} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    mp.spawn(work, args=(folder, str(folder / "store")), nprocs=WORLD_SIZE)
    return folder


@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("style", list(STYLES))
def test_sharded_sequences_give_the_loss_and_gradients_of_full_ones(folder, style, name):
    loss, gradients = loss_and_gradients(build(style), BATCHES[name])
    seen = []
    for rank in range(WORLD_SIZE):
        local_ids, summed_loss, summed_gradients = torch.load(folder / f"{style} {name} {rank}.pt")
        torch.testing.assert_close(summed_loss, loss)
        assert summed_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                summed_gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
        seen.append(local_ids)
    assert all(ids.shape == (2, LENGTH // WORLD_SIZE) for ids in seen)
    assert torch.equal(torch.cat(seen, 1).sort().values, IDS[:, :-1].sort().values)


@pytest.mark.parametrize("name", list(INSIDE))
@pytest.mark.parametrize("style", list(STYLES))
def test_a_backbone_that_shards_its_inputs_equals_one_that_does_not(folder, style, name):
    model = build(style)
    expected = real_logits_and_gradients(model, INSIDE[name])
    expected_ids = generate(model)
    for rank in range(WORLD_SIZE):
        *got, generated = torch.load(folder / f"inside {style} {name} {rank}.pt")
        torch.testing.assert_close(tuple(got), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(generated, expected_ids)


def test_causal_attention_costs_all_ranks_the_same():
    for size in (1, 2, 3, 4):
        positions = [local_positions(48, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat(positions).sort().values, torch.arange(48))
        assert len({int(own.sum()) for own in positions}) == 1


def test_sequences_that_cannot_be_sharded_are_refused():
    config = SimpleNamespace(position_embedding_type="rope", rope_parameters={"rope_type": "default"})
    check_context_length(config, 24, 3)
    with pytest.raises(UserError, match="6 chunks, which does not divide the context length of 32"):
        check_context_length(config, 32, 3)
    config.rope_parameters["rope_type"] = "longrope"
    check_context_length(config, 32, 1)
    with pytest.raises(UserError, match="the frequencies of rope_type longrope depend on the last position"):
        check_context_length(config, 32, 2)
