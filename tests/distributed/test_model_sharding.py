"""A model sharded over two processes by the plans of its config computes what one process does."""

import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.model.conftest import SIZE, STYLES

SHARDINGS = {"tensor parallel": {"tp_size": 2}, "fully sharded": {"fsdp_size": 2}}
IDS = torch.randint(1, SIZE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model, ids):
    model.eval()
    logits = model(ids).logits.detach()
    model.train()(ids, labels=ids).loss.backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


def work(rank, folder, store_file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_file, 2), rank=rank, world_size=2)
    for style in ("gpt2", "modern"):
        for sharding, sizes in SHARDINGS.items():
            model = ScratchGPTForCausalLM.from_pretrained(
                folder / style, distributed_config=DistributedConfig(**sizes), attn_implementation="sdpa"
            )
            # tensor parallel ranks share a batch, fully sharded ones have a row each
            ids = IDS if "tp_size" in sizes else IDS[rank : rank + 1]
            logits, gradients = logits_and_gradients(model, ids)
            whole = {
                name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()
            }
            held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
            torch.save((logits, whole, held), folder / f"{style} {sharding} {rank}.pt")
            model.save_pretrained(folder / f"{style} {sharding}")

    model = ScratchGPTForCausalLM.from_pretrained(folder / "padded").train()
    model.forward = types.MethodType(forward_as_trl_does, model)
    shard_as_accelerate_does(model)
    loss = model(IDS[rank : rank + 1])
    loss.backward()
    whole = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    torch.save((loss.detach(), whole), folder / f"padded {rank}.pt")
    dist.destroy_process_group()


def forward_as_trl_does(self, ids):
    """The loss of `trl.trainer.utils.add_fused_lm_head`, which multiplies by the head's matrix itself."""
    hidden_states = self.base_model(ids, use_cache=False).last_hidden_state[:, :-1]
    weight = self.get_output_embeddings().weight  # gathered already, with the norm that shares its group
    logits = hidden_states @ (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).t()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def shard_as_accelerate_does(model):
    """Shard the groups of `accelerate.utils.fsdp_utils.fsdp2_prepare_model`, which does not run on CPUs."""
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    fully_shard([model.transformer.ln_f, embedding, head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    for style in ("gpt2", "modern"):
        torch.manual_seed(0)
        ScratchGPTForCausalLM(ScratchGPTConfig(**{**SIZE, **STYLES[style]})).save_pretrained(folder / style)
    torch.manual_seed(0)
    padded = ScratchGPTForCausalLM(ScratchGPTConfig(**{**SIZE, **STYLES["modern"], "pad_vocab_size_multiple": 64}))
    padded.save_pretrained(folder / "padded")
    mp.spawn(work, args=(folder, str(folder / "store")), nprocs=2)
    return folder


@pytest.mark.parametrize("sharding", list(SHARDINGS))
@pytest.mark.parametrize("style", ["gpt2", "modern"])
def test_two_processes_give_the_logits_and_gradients_of_one(folder, style, sharding):
    model = ScratchGPTForCausalLM.from_pretrained(folder / style, attn_implementation="sdpa")
    logits, gradients = logits_and_gradients(model, IDS)
    for rank in range(2):
        sharded_logits, sharded_gradients, held = torch.load(folder / f"{style} {sharding} {rank}.pt")
        expected = logits if sharding == "tensor parallel" else logits[rank : rank + 1]
        torch.testing.assert_close(sharded_logits, expected, rtol=1e-5, atol=1e-4)
        assert sharded_gradients.keys() == gradients.keys()
        for name, grad in gradients.items():
            torch.testing.assert_close(
                sharded_gradients[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert held < 0.7 * model.num_parameters()  # each process holds about half of the weights


@pytest.mark.parametrize("sharding", list(SHARDINGS))
@pytest.mark.parametrize("style", ["gpt2", "modern"])
def test_a_sharded_model_saves_the_weights_it_was_loaded_from(folder, style, sharding):
    original = ScratchGPTForCausalLM.from_pretrained(folder / style)
    saved = ScratchGPTForCausalLM.from_pretrained(folder / f"{style} {sharding}")
    assert saved.lm_head.weight is saved.transformer.wte.weight
    for name, weight in original.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight), name


def test_a_padded_vocabulary_fits_trls_loss_and_accelerates_groups_of_modules(folder):
    model = ScratchGPTForCausalLM.from_pretrained(folder / "padded").train()
    loss = model(IDS, labels=IDS, skip_logits=False).loss
    loss.backward()
    losses, gradients = zip(*(torch.load(folder / f"padded {rank}.pt") for rank in range(2)), strict=True)
    torch.testing.assert_close(sum(losses) / 2, loss.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-5)
