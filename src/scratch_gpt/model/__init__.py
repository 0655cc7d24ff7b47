"""The model: its two files are what a saved directory carries. Importing this package registers them with transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig
from scratch_gpt.model.modeling_scratch_gpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
    ScratchGPTPreTrainedModel,
)

AutoConfig.register(ScratchGPTConfig.model_type, ScratchGPTConfig, exist_ok=True)
ScratchGPTConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, ScratchGPTModel),
    (AutoModelForCausalLM, ScratchGPTForCausalLM),
    (AutoModelForSequenceClassification, ScratchGPTForSequenceClassification),
    (AutoModelForTokenClassification, ScratchGPTForTokenClassification),
    (AutoModelForQuestionAnswering, ScratchGPTForQuestionAnswering),
):
    _auto_class.register(ScratchGPTConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class)

__all__ = [
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
]
