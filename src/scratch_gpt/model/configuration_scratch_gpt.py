"""The configuration of ScratchGPT: one class of decoder-only language models, from GPT-2 to Qwen3, chosen by its fields."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Locations of the classes in the code of a saved model, so that `trust_remote_code=True` finds every head.
AUTO_MAP = {
    "AutoConfig": "configuration_scratch_gpt.ScratchGPTConfig",
    "AutoModel": "modeling_scratch_gpt.ScratchGPTModel",
    "AutoModelForCausalLM": "modeling_scratch_gpt.ScratchGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_scratch_gpt.ScratchGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_scratch_gpt.ScratchGPTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_scratch_gpt.ScratchGPTForQuestionAnswering",
}


@strict
class ScratchGPTConfig(PreTrainedConfig):
    r"""
    Sizes and options of a ScratchGPT model. The defaults are the modern style at the size of GPT-2 small: rotary
    positions, RMSNorm, a gated SiLU MLP, QK-norm, no biases, tied embeddings. GPT-2 itself is

    ```python
    ScratchGPTConfig(position_embedding_type="learned", norm_type="layernorm", mlp_type="plain", attention_bias=True,
                     mlp_bias=True, qk_norm=False, max_position_embeddings=1024)
    ```

    Fields that are `None` by default are derived when the config is built, and saved with their derived value.
    GPT-2's names (`n_embd`, `n_layer`, `n_head`, `n_positions`, `n_inner`, `activation_function`, `embd_pdrop`,
    `resid_pdrop`, `attn_pdrop`) and Llama's `rms_norm_eps` are accepted as aliases.

    Args:
        vocab_size: Number of tokens.
        pad_vocab_size_multiple: Embedding and head get rows up to the next multiple of this, because GPUs multiply
            matrices of round sizes faster (64 or 128). No token uses these rows, and the logits do not include them.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: Key/value heads per layer; fewer than `num_attention_heads` is grouped-query attention
            (Ainslie et al. 2023). Default: `num_attention_heads`.
        head_dim: Width of one head. Default: `hidden_size / num_attention_heads`.
        intermediate_size: Width inside the MLP. Default: `4 * hidden_size` for a plain MLP, `8/3 * hidden_size`
            rounded up to a multiple of 64 for a gated one (about the same number of parameters).
        max_position_embeddings: Longest sequence in tokens. With learned positions a hard limit.
        position_embedding_type: `"rope"` (Su et al. 2021), `"learned"` (GPT-2) or `"none"` (NoPE, Kazemnejad et al. 2023).
        rope_parameters: The standard dictionary of transformers, for example
            `{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}`. `rope_theta=` alone is accepted too. A config
            without rotary positions has no such attribute.
        no_rope_layers: One entry per layer, 1 = rotary positions, 0 = none (SmolLM3).
        no_rope_layer_interval: Shorthand for `no_rope_layers`: every n-th layer has no positions.
        norm_type: `"rmsnorm"` (Zhang & Sennrich 2019) or `"layernorm"`.
        norm_bias: Bias in LayerNorm. Default: true for `"layernorm"`; RMSNorm has none.
        layer_norm_epsilon: Epsilon of every norm.
        mlp_type: `"gated"`: `down(act(gate(x)) * up(x))` (Shazeer 2020) or `"plain"`: `down(act(up(x)))`.
        hidden_act: Activation, any key of transformers' `ACT2FN` (`"relu2"` is squared ReLU).
            Default: `"silu"` for a gated MLP, `"gelu_new"` for a plain one.
        attention_bias: Bias on the query, key and value projections.
        attention_out_bias: Bias on the attention's output projection. Default: `attention_bias`. Qwen2 is true/false.
        mlp_bias: Bias on all MLP projections.
        qk_norm: Normalize queries and keys per head before the positions are applied (Qwen3).
        sliding_window: Number of tokens that a `"sliding_attention"` layer attends to, the current one included.
        layer_types: `"full_attention"` or `"sliding_attention"` for each layer. Default: all full.
        final_logit_softcapping: `c` in `logits = c * tanh(logits / c)` (Gemma 2).
        attention_dropout: Dropout on attention probabilities.
        hidden_dropout: Dropout on what attention and MLP add to the residual stream.
        embedding_dropout: Dropout on the sum of token and position embeddings.
        initializer_range: Standard deviation of the initial weights; the two projections that write into the residual
            stream get it divided by `sqrt(2 * num_hidden_layers)` (GPT-2).
        tie_word_embeddings: Whether the head shares the embedding matrix.
        use_cache: Whether to return the key/value cache when not training.
        bos_token_id, eos_token_id, pad_token_id: Ids of the special tokens.

    Raises:
        ValueError: A combination of fields makes no sense. The message lists every problem with the field, its value
            and the fix. An unknown field whose name is close to a known one is refused as well (in a saved config,
            where attributes added by its user are kept, it is a warning).
    """

    model_type = "scratch_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "embd_pdrop": "embedding_dropout",
        "resid_pdrop": "hidden_dropout",
        "attn_pdrop": "attention_dropout",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    default_theta = 10_000.0

    vocab_size: int = 50257
    pad_vocab_size_multiple: int = 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048

    position_embedding_type: Literal["rope", "learned", "none"] = "rope"
    rope_parameters: RopeParameters | dict | None = dataclasses.field(default_factory=lambda: None)  # may be deleted
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int | None = None

    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool | None = None
    layer_norm_epsilon: float = 1e-5

    mlp_type: Literal["gated", "plain"] = "gated"
    hidden_act: str | None = None
    mlp_bias: bool = False

    attention_bias: bool = False
    attention_out_bias: bool | None = None
    qk_norm: bool = True
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    final_logit_softcapping: float | int | None = None
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0

    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        # Aliases arrive as leftover keyword arguments. They must be set before anything is derived from them.
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))
        problems = self._misspelt_fields(kwargs)

        rope = self.position_embedding_type == "rope"
        if not rope:
            given = [name for name in ("rope_theta", "rope_scaling") if kwargs.pop(name, None) is not None]
            given += ["rope_parameters"] if self.rope_parameters else []
            for name in given:
                problems.append(
                    f"{name} is given, but position_embedding_type={self.position_embedding_type!r} has no rotary "
                    f'positions: drop {name} or set position_embedding_type="rope"'
                )
            # transformers takes `hasattr(config, "rope_parameters")` for rotary positions.
            del self.rope_parameters
        elif self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # a copy, since the base class fills it in

        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                problems.append(
                    f"hidden_size={self.hidden_size} is not divisible by "
                    f"num_attention_heads={self.num_attention_heads}: change one of them or give head_dim"
                )
            else:
                self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = (
                -(-8 * self.hidden_size // (3 * 64)) * 64 if self.mlp_type == "gated" else 4 * self.hidden_size
            )
        if self.hidden_act is None:
            self.hidden_act = "silu" if self.mlp_type == "gated" else "gelu_new"
        if self.norm_bias is None:
            self.norm_bias = self.norm_type == "layernorm"
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            if self.sliding_window is not None:
                problems.append(
                    f"sliding_window={self.sliding_window} is given without layer_types: say which layers slide (all, as "
                    'in Mistral: layer_types=["sliding_attention"] * num_hidden_layers) or drop sliding_window'
                )
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        elif self.sliding_window is not None and "sliding_attention" not in self.layer_types:
            logger.warning(f"sliding_window={self.sliding_window} is ignored: layer_types has no sliding_attention.")
        if self.no_rope_layers is None and self.no_rope_layer_interval is not None and self.no_rope_layer_interval > 0:
            self.no_rope_layers = self._no_rope_layers_by_interval()

        self._check(problems)
        # TRL reads `config.auto_map`, and a checkpoint must name the code of every head, not only of the one saved.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self._set_parallel_plans()

    def __eq__(self, other: object) -> bool:
        """Compare what would be saved (a dataclass's own `==` fails where a field was deleted)."""
        return isinstance(other, ScratchGPTConfig) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Build a config from a dictionary; one that belongs to another `model_type` is a `ValueError`."""
        model_type = config_dict.get("model_type")
        if model_type not in (None, "", cls.model_type):
            raise ValueError(
                f"this configuration has model_type={model_type!r}, expected {cls.model_type!r}: "
                "load it with AutoConfig, or convert the model first"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding and of the head."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def validate_architecture(self):
        """Refuse a contradictory config with one `ValueError` that names every problem (also run at each save)."""
        super().validate_architecture()
        if not self.is_heterogeneous:
            self._check([])

    def _check(self, problems: list[str]) -> None:
        problems = problems + self._contradictions()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems) + ".")

    def _contradictions(self) -> list[str]:
        problems = []

        def refuse(wrong: bool, message: str) -> None:
            if wrong:
                problems.append(message)

        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            refuse(value < 1, f"{name}={value} must be at least 1")
        refuse(self.num_hidden_layers < 0, f"num_hidden_layers={self.num_hidden_layers} must not be negative")
        refuse(self.head_dim is not None and self.head_dim < 1, f"head_dim={self.head_dim} must be at least 1")
        refuse(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads != 0,
            f"num_attention_heads={self.num_attention_heads} is not divisible by "
            f"num_key_value_heads={self.num_key_value_heads}: every key/value head serves a full group of query heads",
        )
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout"):
            value = getattr(self, name)
            refuse(not 0 <= value < 1, f"{name}={value} must lie in [0, 1)")
        refuse(
            self.hidden_act not in ACT2FN,
            f"hidden_act={self.hidden_act!r} is not an activation of transformers{_did_you_mean(self.hidden_act, ACT2FN)}",
        )
        refuse(
            self.norm_type == "rmsnorm" and bool(self.norm_bias),
            'norm_bias=True needs norm_type="layernorm": RMSNorm has no bias',
        )
        refuse(
            self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0,
            f"final_logit_softcapping={self.final_logit_softcapping} must be positive; None switches it off",
        )
        return problems + self._layer_contradictions() + self._position_contradictions()

    def _layer_contradictions(self) -> list[str]:
        problems = []
        layer_types = self.layer_types or []
        allowed = ("full_attention", "sliding_attention")
        if len(layer_types) != self.num_hidden_layers:
            problems.append(
                f"layer_types has {len(layer_types)} entries, but num_hidden_layers={self.num_hidden_layers}: "
                "give one per layer"
            )
        if unknown := sorted(set(layer_types) - set(allowed)):
            problems.append(f"layer_types holds {unknown}: the choices are {list(allowed)}")
        if self.sliding_window is None and "sliding_attention" in layer_types:
            problems.append(
                'layer_types holds "sliding_attention", but sliding_window is None: give the window in tokens'
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(f"sliding_window={self.sliding_window} must be at least 1")
        return problems

    def _position_contradictions(self) -> list[str]:
        problems = []
        rope = self.position_embedding_type == "rope"
        if not rope:
            for name in ("no_rope_layers", "no_rope_layer_interval"):
                if getattr(self, name) is not None:
                    problems.append(
                        f"{name} is given, but position_embedding_type={self.position_embedding_type!r} has no rotary "
                        f'positions to omit: drop {name} or set position_embedding_type="rope"'
                    )
            return problems
        if self.head_dim is not None and self.head_dim % 2:
            problems.append(
                f"head_dim={self.head_dim} is odd, but rotary positions rotate pairs of dimensions: make it even"
            )
        if self.no_rope_layer_interval is not None:
            if self.no_rope_layer_interval < 1:
                problems.append(f"no_rope_layer_interval={self.no_rope_layer_interval} must be at least 1")
            elif self.no_rope_layers != self._no_rope_layers_by_interval():
                problems.append(
                    f"no_rope_layers={self.no_rope_layers} and no_rope_layer_interval={self.no_rope_layer_interval} "
                    "disagree: give one of them"
                )
        if self.no_rope_layers is not None:
            if len(self.no_rope_layers) != self.num_hidden_layers:
                problems.append(
                    f"no_rope_layers has {len(self.no_rope_layers)} entries, but "
                    f"num_hidden_layers={self.num_hidden_layers}: give one per layer"
                )
            if not set(self.no_rope_layers) <= {0, 1}:
                problems.append(f"no_rope_layers={self.no_rope_layers} may hold only 1 (rotary) and 0 (no positions)")
        rope_parameters = self.rope_parameters or {}
        if any(name in ("full_attention", "sliding_attention") for name in rope_parameters):
            problems.append("rope_parameters per layer type are not supported: give one dictionary for all layers")
        rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
        choices = ["default", *ROPE_INIT_FUNCTIONS]
        if rope_type not in choices:
            problems.append(f"rope_parameters has rope_type={rope_type!r}{_did_you_mean(rope_type, choices)}")
        if rope_type != "proportional" and rope_parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
            problems.append(
                f"rope_parameters has partial_rotary_factor={rope_parameters['partial_rotary_factor']}: "
                'here every dimension of a head is rotated; drop it or set rope_type="proportional", which rotates the rest by 0'
            )
        return problems

    def _no_rope_layers_by_interval(self) -> list[int]:
        return [int((layer + 1) % self.no_rope_layer_interval != 0) for layer in range(self.num_hidden_layers)]

    def _misspelt_fields(self, kwargs: dict[str, Any]) -> list[str]:
        """Find unknown keyword arguments close to a field's name: transformers would store them silently."""
        fields = [*self.__dataclass_fields__, "rope_theta"]
        known = {*fields, *self.attribute_map, "num_labels", "attn_implementation"}
        generation = GenerationConfig._get_default_generation_params()
        problems = []
        for name in kwargs:
            if name in known or name in generation or name.startswith("_") or name.endswith("_token_id"):
                continue
            if hasattr(type(self), name) or name in ("auto_map", "rope_scaling", "torch_dtype", "name_or_path"):
                continue
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.72)
            nearest += [field for field in fields if field.endswith(f"_{name}")]  # dropout, heads, layers, ...
            if nearest:
                problems.append(f"unknown field {name!r}: did you mean {nearest[0]!r}?")
        if self.transformers_version is not None:  # a saved config; attributes that its user added are saved with it
            for problem in problems:
                logger.warning(f"config.json of a {self.model_type} model: {problem} It is kept, but changes nothing.")
            return []
        return problems

    def _set_parallel_plans(self) -> None:
        # Per instance, since every rule must match a module that this model has.
        tp_plan = {
            "wte": "embedding_rowwise",
            "h.*.attn.q_proj": "colwise",
            "h.*.attn.k_proj": "colwise",
            "h.*.attn.v_proj": "colwise",
            "h.*.attn.o_proj": "rowwise",
            "h.*.mlp.up_proj": "colwise",
            "h.*.mlp.down_proj": "rowwise",
        }
        if self.mlp_type == "gated":
            tp_plan["h.*.mlp.gate_proj"] = "colwise"
        if self.qk_norm:
            tp_plan["h.*.attn.q_norm"] = "replicated_with_grad_allreduce"
            tp_plan["h.*.attn.k_norm"] = "replicated_with_grad_allreduce"
        fsdp_plan = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}
        pp_plan = {
            "wte": (["input_ids"], ["inputs_embeds"]),
            "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "ln_f": (["hidden_states"], ["hidden_states"]),
        }
        if self.position_embedding_type == "learned":
            fsdp_plan["wpe"] = "free_full_weight"
        self.base_model_tp_plan = tp_plan
        self.base_model_fsdp_plan = fsdp_plan
        # A pipeline stage passes hidden states to the next as inputs_embeds, to which learned positions would be added again.
        self.base_model_pp_plan = None if self.position_embedding_type == "learned" else pp_plan


def _did_you_mean(name: Any, choices) -> str:
    nearest = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.0)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


class CheckpointMismatchError(ValueError, RuntimeError):
    """The weights of a checkpoint do not fit the model. (A RuntimeError too, as transformers raises for wrong shapes.)"""


def check_loaded_weights(
    model: Any, info: dict[str, Any], folder: Any, ignore_mismatched_sizes: bool, shapes_only: bool
) -> None:
    """Refuse a model whose configuration requests other weights than its checkpoint held.

    Args:
        info: The loading info of `from_pretrained`: missing, unexpected and mismatched weights.
        folder: Where the checkpoint was loaded from, or None for a state dict.

    Raises:
        CheckpointMismatchError: Weights have another shape (unless `ignore_mismatched_sizes`), or are missing or unexpected
            (unless `shapes_only`). If another class saved the checkpoint, its head may differ.
    """
    name, where = type(model).__name__, folder or "the state dict"
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        shapes = [f"{key} is {tuple(saved)}, not {tuple(ours)}" for key, saved, ours in info["mismatched_keys"]]
        raise CheckpointMismatchError(
            f"{where} holds weights of other shapes than this {name}: {_enumerate(shapes)}. Load it with the config that "
            "it was saved with, or initialize these weights at random with ignore_mismatched_sizes=True"
        )
    if shapes_only:
        return
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if name not in (model.config.architectures or ()):  # another class saved it, with its own head
        backbone = {model.base_model_prefix, *(child for child, _ in model.base_model.named_children())}
        missing = {key for key in missing if key.split(".")[0] in backbone}
        unexpected = {key for key in unexpected if key.split(".")[0] in backbone}
    problems = [f"it lacks {_enumerate(missing)}"] if missing else []
    problems += [f"it holds unknown {_enumerate(unexpected)}"] if unexpected else []
    if problems:
        raise CheckpointMismatchError(
            f"{where} does not fit {name}: {'; '.join(problems)}. Load it with the class and the config that it was saved "
            "with, or rename weights with key_mapping={pattern: replacement}; with output_loading_info=True it is loaded "
            "as it is, and missing weights are initialized at random"
        )


def _enumerate(names, limit: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


__all__ = ["ScratchGPTConfig"]
