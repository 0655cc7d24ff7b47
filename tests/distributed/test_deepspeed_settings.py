"""Settings that ZeRO refuses before anything is built, with a fix in the message; DeepSpeed need not be installed."""

from types import SimpleNamespace

import pytest

from scratch_gpt.alignment import recipe
from scratch_gpt.config import PretrainSettings
from scratch_gpt.distributed import deepspeed
from scratch_gpt.distributed.deepspeed import check_settings, deepspeed_config
from scratch_gpt.distributed.pipeline import build_pipeline_strategy
from scratch_gpt.distributed.setup import build_strategy
from scratch_gpt.errors import UserError


@pytest.fixture
def launched(monkeypatch):
    """The environment that `accelerate launch` sets for a configuration file with distributed_type: DEEPSPEED."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return monkeypatch


def test_if_deepspeed_is_missing_the_package_is_named_and_no_other_strategy_is_taken(launched):
    launched.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed: pip install 'scratch-gpt\[deepspeed\]'"):
        build_strategy()


def test_zero_refuses_tensor_context_and_hybrid_parallelism(launched):
    launched.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config together with distributed_type: DEEPSPEED"):
        build_strategy()


def test_zero_refuses_pipelines():
    settings = PretrainSettings(run_dir="unused")
    settings.parallel.pipeline = 2
    with pytest.raises(UserError, match="--parallel.pipeline is 2, the configuration file says zero1"):
        build_pipeline_strategy(SimpleNamespace(name="zero1", world_size=2), settings, None, 32)


def test_alignment_asks_for_the_package_too_and_refuses_to_shard_4_bit_weights(launched):
    launched.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed: pip install 'scratch-gpt\[deepspeed\]'"):
        recipe.check_launch(SimpleNamespace(), "sft")
    launched.setattr(recipe, "requested_deepspeed_config", lambda: {"zero_optimization": {"stage": 3}})
    with pytest.raises(
        UserError, match="zero_stage is 3, .* weights of --load-in-4bit: use configs/accelerate/zero2.yaml"
    ):
        recipe.check_launch(SimpleNamespace(load_in_4bit=True, lora_rank=16), "sft")


@pytest.mark.parametrize(
    ("stage", "requested", "setting"),
    [
        (1, ("muon", "fp32", False), "optimizer muon"),
        (2, ("adamw", "fp16", False), "precision fp16"),
        (3, ("adamw", "fp8", False), "precision fp8"),
        (3, ("adamw", "bf16", True), "compile on"),
    ],
)
def test_settings_that_a_stage_does_not_support_are_refused(stage, requested, setting):
    with pytest.raises(UserError, match=f"--training.{setting} is not supported under zero{stage}: .*fsdp2.yaml"):
        check_settings(stage, *requested)
    check_settings(stage, "adamw", "auto", stage < 3)


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_stage is 0; it must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16 cannot be given there"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, "gradient_clipping cannot be given there"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size under"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param_device nvme is not"),
        ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, "cpu is for a higher zero_stage than 2"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": CPU}}, "cpu is for a higher zero_stage than 1"),
    ],
)
def test_a_configuration_with_more_than_zero_settings_is_refused(requested, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config({"gradient_accumulation_steps": "auto", **requested})


def test_zero_settings_are_passed_to_deepspeed():
    config = deepspeed_config(
        {"zero_optimization": {"stage": 3, "offload_param": CPU, "stage3_max_live_parameters": 7}}
    )
    assert config["zero_optimization"] == {"stage": 3, "offload_param": CPU, "stage3_max_live_parameters": 7}
    assert config["communication_data_type"] == "fp32" and config["gradient_clipping"] == 0.0
