"""The model. Importing this package registers it with the Auto classes of transformers.

A saved model carries four of these files: `modeling_scratch_gpt.py`, `kernels_scratch_gpt.py`, `loss_scratch_gpt.py` and
`configuration_scratch_gpt.py`. They import each other relatively and nothing else of `scratch_gpt`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

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
# The tables of names, which `register` does not fill, are what Trainer, evaluation harnesses and transformers' own tests
# look models up in.
for _auto_class, _model_class, _names in (
    (AutoModel, ScratchGPTModel, modeling_auto.MODEL_MAPPING_NAMES),
    (AutoModelForCausalLM, ScratchGPTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        AutoModelForSequenceClassification,
        ScratchGPTForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForTokenClassification,
        ScratchGPTForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForQuestionAnswering,
        ScratchGPTForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
):
    _auto_class.register(ScratchGPTConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class)
    _names.setdefault(ScratchGPTConfig.model_type, _model_class.__name__)

__all__ = [
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
]
