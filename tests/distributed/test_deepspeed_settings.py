"""What ZeRO refuses, with DeepSpeed or without: before anything is built, with the mend."""

from types import SimpleNamespace

import pytest

from scratch_gpt.alignment import recipe as stage
from scratch_gpt.config import PretrainSettings
from scratch_gpt.distributed import deepspeed as zero
from scratch_gpt.distributed.deepspeed import check, deepspeed_config
from scratch_gpt.distributed.pipeline import build_pipeline_strategy
from scratch_gpt.distributed.setup import build_strategy
from scratch_gpt.errors import UserError


@pytest.fixture
def launched(monkeypatch):
    """As `accelerate launch` does it for a configuration file with distributed_type: DEEPSPEED."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return monkeypatch


def test_without_deepspeed_the_package_is_named_and_no_other_layout_is_taken(launched):
    launched.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed: pip install 'scratch-gpt\[deepspeed\]'"):
        build_strategy()


def test_tensor_context_and_hybrid_parallelism_are_not_beside_zero(launched):
    launched.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config together with distributed_type: DEEPSPEED"):
        build_strategy()


def test_pipelines_are_not_beside_zero():
    settings = PretrainSettings(run_dir="unused")
    settings.parallel.pipeline = 2
    with pytest.raises(UserError, match="--parallel.pipeline is 2, the configuration file says zero1"):
        build_pipeline_strategy(SimpleNamespace(strategy="zero1", world=2), settings, None, 32)


def test_stages_of_alignment_ask_for_the_package_too_and_do_not_cut_weights_in_4_bits(launched):
    launched.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed: pip install 'scratch-gpt\[deepspeed\]'"):
        stage.check_launch(SimpleNamespace(), "sft")
    launched.setattr(stage, "requested_config", lambda: {"zero_optimization": {"stage": 3}})
    with pytest.raises(
        UserError, match="zero_stage is 3, .* weights of --load-in-4bit: use configs/accelerate/zero2.yaml"
    ):
        stage.check_launch(SimpleNamespace(load_in_4bit=True, lora_rank=16), "sft")


@pytest.mark.parametrize(
    ("number", "asked", "what"),
    [
        (1, ("muon", "fp32", False), "optimizer muon"),
        (2, ("adamw", "fp16", False), "precision fp16"),
        (3, ("adamw", "fp8", False), "precision fp8"),
        (3, ("adamw", "bf16", True), "compile on"),
    ],
)
def test_settings_that_a_stage_cannot_follow_are_refused(number, asked, what):
    with pytest.raises(UserError, match=f"--training.{what} is not supported under zero{number}: .*fsdp2.yaml"):
        check(number, *asked)
    check(number, "adamw", "auto", number < 3)


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("asked", "message"),
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
def test_a_configuration_that_says_more_than_zero_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config({"gradient_accumulation_steps": "auto", **asked})


def test_what_belongs_to_zero_is_passed_on():
    config = deepspeed_config(
        {"zero_optimization": {"stage": 3, "offload_param": CPU, "stage3_max_live_parameters": 7}}
    )
    assert config["zero_optimization"] == {"stage": 3, "offload_param": CPU, "stage3_max_live_parameters": 7}
    assert config["communication_data_type"] == "fp32" and config["gradient_clipping"] == 0.0
