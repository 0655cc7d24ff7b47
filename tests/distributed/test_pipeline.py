"""A model whose blocks are spread over processes computes what it does in one."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from scratch_gpt.compute.activation_checkpointing import enable_activation_checkpointing
from scratch_gpt.config import ParallelSettings, PretrainSettings, TrainingSettings
from scratch_gpt.data.batches import Batch
from scratch_gpt.distributed.pipeline import Pipeline, build_pipeline_strategy, micro_batch_size, split_into_stages
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.flops import flops_per_token
from tests.model.conftest import SIZE, STYLES

LAYOUTS = {"four stages": ((4, 1), "1f1b"), "two by two": ((2, 2), "1f1b"), "interleaved": ((2, 2), "interleaved1f1b")}
MICRO_BATCHES, ROWS, CONTEXT = 4, 2, 12
WORLD = 4


def build(style):
    torch.manual_seed(0)
    fields = {**SIZE, **STYLES[style], "num_hidden_layers": 6}
    if "layer_types" in fields:
        fields["layer_types"] = 2 * fields["layer_types"]
    config = ScratchGPTConfig(**fields)
    model = ScratchGPTForCausalLM(config).train()
    enable_activation_checkpointing(
        model, TrainingSettings(activation_checkpointing="full", activation_checkpointing_every=2)
    )
    return model


def batches(copy):
    """The micro-batches of one of two data-parallel copies: packed documents, some targets left out."""
    random = torch.Generator().manual_seed(copy)
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(1, SIZE["vocab_size"], (ROWS, CONTEXT + 1), generator=random)
        labels = ids[:, 1:].clone()
        labels[0, 7 + copy :] = -100
        yield Batch(ids[:, :-1], labels, torch.cat([torch.arange(5), torch.arange(7)]).expand(ROWS, -1))


SMALL = Batch(*(tensor[:1, :9] for tensor in next(batches(0))._tensors()))
"""One row, shorter than those that the pipeline trains on."""


def work(rank, folder, store_file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_file, WORLD), rank=rank, world_size=WORLD)
    for strategy, (shape, schedule) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pipeline", "data"))
        copy = mesh.get_local_rank("data")
        for style in ("gpt2", "modern", "mixture"):
            own = [batch for one in range(2) if shape[1] == 1 or one == copy for batch in batches(one)]
            pipeline = Pipeline(build(style), mesh, schedule, CONTEXT, torch.device("cpu"), contextlib.nullcontext)
            parameters = dict(pipeline.model.named_parameters())
            num_targets = sum(int((batch.targets != -100).sum()) for one in range(2) for batch in batches(one))
            loss = pipeline.forward_backward(own, num_targets, loss_factor=8.0)
            result = {
                "loss": loss,
                "gradients": pipeline.gather_full({name: p.grad / 8 for name, p in parameters.items()}),
                "weights": pipeline.gather_full(parameters),
                "validation": pipeline.sum_of_losses(SMALL),
                "names": list(parameters),
                "stages": len(pipeline.stages),
            }
            if pipeline.tied_end is not None:
                result["tied gradient"] = pipeline.tied_end.grad / 8
            torch.save(result, folder / f"{strategy} {style} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    mp.spawn(work, args=(folder, str(folder / "store")), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("strategy", list(LAYOUTS))
@pytest.mark.parametrize("style", ["gpt2", "modern", "mixture"])
def test_a_step_through_the_pipeline_is_that_of_one_process(folder, style, strategy):
    model = build(style)
    everything = [batch for copy in range(2) for batch in batches(copy)]
    num_targets = sum(int((batch.targets != -100).sum()) for batch in everything)
    loss = torch.zeros(())
    for batch in everything:
        arguments = {"shift_labels": batch.targets, "num_items_in_batch": num_targets}
        part = model(batch.input_ids, position_ids=batch.position_ids, **arguments).loss
        part.backward()
        loss += part.detach()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    arguments = {"shift_labels": SMALL.targets, "num_items_in_batch": 1}
    validation = model(SMALL.input_ids, position_ids=SMALL.position_ids, **arguments).loss.detach()

    shape, schedule = LAYOUTS[strategy]
    results = [torch.load(folder / f"{strategy} {style} {rank}.pt") for rank in range(WORLD)]
    whole_loss = sum(results[rank]["loss"] for rank in range(shape[1]))  # of one process from each copy
    torch.testing.assert_close(whole_loss, loss)
    for what, expected in (("gradients", gradients), ("weights", dict(model.named_parameters()))):
        assert results[0][what].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                results[0][what][name], tensor.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for result in results:
        torch.testing.assert_close(result["validation"], validation)
        if "tied gradient" in result:
            assert torch.equal(result["tied gradient"], results[0]["gradients"]["transformer.wte.weight"])
    # each process holds its stages and no more
    per_process = 2 if schedule == "interleaved1f1b" else 1
    stages = split_into_stages(model.config, CONTEXT, shape[0] * per_process).blocks
    for rank, result in enumerate(results):
        stage = rank // shape[1]
        blocks = {int(name.split(".")[2]) for name in result["names"] if ".h." in name}
        assert blocks == {block for number in range(stage, len(stages), shape[0]) for block in stages[number]}
        assert ("lm_head.weight" in result["names"]) == (stage == shape[0] - 1 and style == "mixture")
        assert result["stages"] == per_process
        at_an_end = model.config.tie_word_embeddings and stage in (0, shape[0] - 1)
        assert ("tied gradient" in result) == at_an_end
        assert ("transformer.wte.weight" in result["names"]) == (stage == 0 or at_an_end)


@pytest.mark.parametrize("vocab_size", [97, 1000, 4000])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_no_split_has_a_faster_slowest_stage(stages, vocab_size):
    config = ScratchGPTConfig(**{**SIZE, "num_hidden_layers": 8, "vocab_size": vocab_size})
    chosen = split_into_stages(config, CONTEXT, stages)
    assert [block for blocks in chosen.blocks for block in blocks] == list(range(8))
    assert sum(chosen.shares) == pytest.approx(1)
    head = 6 * vocab_size * config.hidden_size / flops_per_token(config, CONTEXT).total
    block = (1 - head) / 8
    slowest = []
    for cuts in itertools.combinations(range(1, 8), stages - 1):
        sizes = [end - start for start, end in itertools.pairwise([0, *cuts, 8])]
        slowest.append(max(*(size * block for size in sizes), sizes[-1] * block + head))
    assert max(chosen.shares) == pytest.approx(min(slowest))


PLAIN = SimpleNamespace(name="ddp", world_size=4)
SHARDED = {
    name: SimpleNamespace(name="fsdp2", world_size=4, offloads_to_cpu=name == "offloaded")
    for name in ("kept", "offloaded")
}
REFUSED = {
    "must divide the number of processes, which is 4": (PLAIN, ParallelSettings(pipeline=3), {}),
    "8 stages, but the model has only 6 blocks": (PLAIN, ParallelSettings(4, "interleaved1f1b"), {}),
    "the configuration file says hsdp": (SimpleNamespace(name="hsdp", world_size=4), ParallelSettings(2), {}),
    "no two share a stage": (SHARDED["kept"], ParallelSettings(4), {}),
    "fsdp_offload_params is true": (SHARDED["offloaded"], ParallelSettings(2), {}),
    "leave it at 0": (PLAIN, ParallelSettings(2), {"batch_warmup_steps": 10}),
    "sample_every is given": (PLAIN, ParallelSettings(2), {"sample_every": 10}),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_cannot_be_a_pipeline_is_refused(message):
    strategy, parallel, training = REFUSED[message]
    settings = PretrainSettings(parallel=parallel, training=TrainingSettings(**training))
    with pytest.raises(UserError, match=message):
        build_pipeline_strategy(strategy, settings, build("modern").config, CONTEXT)


def test_rows_are_divided_into_what_the_schedule_can_run():
    assert micro_batch_size(ParallelSettings(2), 32, None) == 4
    assert micro_batch_size(ParallelSettings(2, pipeline_microbatches=4), 32, None) == 8
    assert micro_batch_size(ParallelSettings(4, "interleaved1f1b"), 32, 2) == 2
    for settings, asked, message in (
        (ParallelSettings(2, pipeline_microbatches=4), 8, "not both"),
        (ParallelSettings(2, pipeline_microbatches=5), None, "32 rows per pipeline and step do not divide into 5"),
        (ParallelSettings(4, pipeline_microbatches=2), None, "2 micro-batches cannot fill the 4 stages"),
        (ParallelSettings(4, "interleaved1f1b"), 16, "a multiple of --parallel.pipeline 4 micro-batches"),
    ):
        with pytest.raises(UserError, match=message):
            micro_batch_size(settings, 32, asked)
