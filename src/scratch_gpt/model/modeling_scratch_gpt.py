"""ScratchGPT: decoder-only language models from GPT-2 to Qwen3, as a first-class model of transformers.

Read it top to bottom: norm, linear layer, positions, attention, MLP and block; then the backbone (`ScratchGPTModel`) and
the heads on it. Three files travel with this one in every saved model, and depend on torch and transformers only:

- `configuration_scratch_gpt.py` explains every option;
- `kernels_scratch_gpt.py` holds faster ways through the same operations on CPUs. Every `choose_…` below returns one, or
  `None` for the plain operation that stands here;
- `loss_scratch_gpt.py` computes the cross-entropy without ever holding all logits.

Shapes are written (batch, seq, ...); `seq` counts the tokens of this call, `kv_seq` these and the cached ones.
"""

import math
from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_scratch_gpt import AUTO_MAP, ScratchGPTConfig, check_loaded_weights
from .kernels_scratch_gpt import choose_attention, choose_gelu, choose_linear, choose_rms_norm
from .loss_scratch_gpt import causal_lm_loss_without_logits, check_labels


class ScratchGPTRMSNorm(nn.RMSNorm):
    """Divide each vector by its root mean square and scale it by a learned weight (Zhang & Sennrich 2019).

    The statistics are float32 whatever the dtype of the input, which is also the dtype of the output.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (fast_rms_norm := choose_rms_norm(x)) is not None:
            return fast_rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ScratchGPTLayerNorm(nn.LayerNorm):
    """Shift each vector to mean 0, scale it to variance 1, then scale and shift it by learned parameters (Ba et al. 2016).

    Weights that sharded training has gathered in bfloat16 are applied to float32 inputs in float32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or self.weight.dtype == torch.float32:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), bias, self.eps)


def build_norm(config: ScratchGPTConfig, size: int) -> nn.Module:
    """Build the norm of `config.norm_type` over a last dimension of `size`."""
    if config.norm_type == "rmsnorm":
        return ScratchGPTRMSNorm(size, eps=config.layer_norm_epsilon)
    return ScratchGPTLayerNorm(size, eps=config.layer_norm_epsilon, bias=config.norm_bias)


class ScratchGPTLinear(nn.Linear):
    """`x @ weight.T + bias`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (fast_linear := choose_linear(x, self.weight, self.bias)) is not None:
            return fast_linear(x, self.weight, self.bias)
        return super().forward(x)


def build_linear(config: ScratchGPTConfig, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Build a linear layer, of no class of our own if the model is quantized: quantizers replace only `nn.Linear` itself."""
    linear_class = ScratchGPTLinear if getattr(config, "quantization_config", None) is None else nn.Linear
    return linear_class(in_features, out_features, bias=bias)


class ScratchGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions (Su et al. 2021), for every `rope_type` of transformers."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        default = self.compute_default_rope_parameters
        rope_init_fn: Callable = default if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ScratchGPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies theta^(-2i/head_dim), shape (head_dim / 2,), and the scaling factor 1."""
        base, dim = config.rope_parameters["rope_theta"], config.head_dim
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines for `apply_rotary_positions`, in the dtype of `x`, each (batch or 1, seq, 1, head_dim)."""
        angles = position_ids[:, :, None, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def apply_rotary_positions(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + head_dim/2]) of `x` (batch, seq, heads, head_dim) by the angles of their positions.

    (a, b) becomes (a cos - b sin, b cos + a sin); `roll` by half a head swaps a and b.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin


def repeat_kv(hidden_states: torch.Tensor, repeats: int) -> torch.Tensor:
    """(batch, kv_heads, kv_seq, head_dim) to (batch, kv_heads * repeats, kv_seq, head_dim), each head `repeats` times."""
    if repeats == 1:
        return hidden_states
    return hidden_states[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention by its definition (Vaswani et al. 2017, eq. 1); return the output and the weights.

    Query is (batch, heads, seq, head_dim), key and value (batch, kv_heads, kv_seq, head_dim). The mask is added to the
    scores: 0 where a query may attend, a large negative number elsewhere. The softmax is float32.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (batch, heads, seq, kv_seq)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()  # (batch, seq, heads, head_dim)
    return output, weights


class ScratchGPTAttention(nn.Module):
    """Causal multi-head attention; fewer key/value heads than query heads make it grouped-query attention."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.use_rope = config.position_embedding_type == "rope" and (
            config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        )

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = build_linear(config, config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = build_linear(config, config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = build_linear(config, config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = build_linear(config, query_size, config.hidden_size, bias=config.attention_out_bias)
        self.o_proj.writes_to_residual_stream = True
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.attn_dropout = nn.Dropout(config.attention_dropout)
        self.resid_dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)  # -1: a tensor-parallel rank holds a shard of the heads
        query = self.q_proj(hidden_states).view(head_shape)  # (batch, seq, heads, head_dim)
        key = self.k_proj(hidden_states).view(head_shape)  # (batch, seq, kv_heads, head_dim)
        value = self.v_proj(hidden_states).view(head_shape)
        if self.q_norm is not None:
            # The casts act under autocast only, where norms and angles are float32.
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if self.use_rope:
            cos, signed_sin = (angle.to(value.dtype) for angle in position_embeddings)
            query, key = apply_rotary_positions(query, cos, signed_sin), apply_rotary_positions(key, cos, signed_sin)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # heads before seq

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (batch, kv_heads, kv_seq, head_dim)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa" and kwargs.get("is_causal", True):
            attention_interface = choose_attention(self, query, key, attention_mask) or attention_interface
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = self.o_proj(output.reshape(*input_shape, -1).contiguous())  # (batch, seq, hidden)
        return self.resid_dropout(output), weights


class ScratchGPTGELU(nn.Module):
    """GPT-2's activation: `0.5 x (1 + tanh(u))` with `u = sqrt(2/pi) (x + 0.044715 x^3)` (Hendrycks & Gimpel 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (fast_gelu := choose_gelu(x)) is not None:
            return fast_gelu(x)
        return F.gelu(x, approximate="tanh")


class ScratchGPTMLP(nn.Module):
    """`down(act(up(x)))`."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        hidden_size, intermediate_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        gated = config.mlp_type == "gated"
        self.gate_proj = build_linear(config, hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = build_linear(config, hidden_size, intermediate_size, bias=bias)
        self.down_proj = build_linear(config, intermediate_size, hidden_size, bias=bias)
        self.down_proj.writes_to_residual_stream = True
        tanh_gelus = ("gelu_new", "gelu_pytorch_tanh")  # the same function, as eight operations and as one
        self.act_fn = ScratchGPTGELU() if config.hidden_act in tanh_gelus else ACT2FN[config.hidden_act]
        self.resid_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.up_proj(hidden_states))  # (batch, seq, intermediate)
        return self.resid_dropout(self.down_proj(inner))


class ScratchGPTGatedMLP(ScratchGPTMLP):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020). vLLM fuses a forward without branches, hence the class of its own."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)  # (batch, seq, intermediate)
        return self.resid_dropout(self.down_proj(inner))


class ScratchGPTBlock(GradientCheckpointingLayer):
    """One layer: attention and MLP, each applied to the normalized residual stream and added back to it."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = build_norm(config, config.hidden_size)
        self.attn = ScratchGPTAttention(config, layer_idx)
        self.ln_2 = build_norm(config, config.hidden_size)
        self.mlp = ScratchGPTGatedMLP(config) if config.mlp_type == "gated" else ScratchGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class ScratchGPTPreTrainedModel(PreTrainedModel):
    """Capabilities, initialization, loading and saving that all ScratchGPT models share."""

    config: ScratchGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScratchGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScratchGPTBlock, "attentions": ScratchGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Sample normal weights, smaller by `sqrt(2 * layers)` for projections into the residual stream (GPT-2)."""
        super()._init_weights(module)
        # The projection itself carries the mark: for code outside transformers, modules without parameters of their own
        # (attention, MLP) are never passed to this method.
        if getattr(module, "writes_to_residual_stream", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Resize as transformers does, and keep the padding of the vocabulary to a multiple."""
        config, multiple = self.config, self.config.pad_vocab_size_multiple
        if multiple == 1 or new_num_tokens is pad_to_multiple_of is None:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        new_num_tokens = new_num_tokens or config.vocab_size
        new_num_tokens = math.ceil(new_num_tokens / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        try:
            config.vocab_size, config.pad_vocab_size_multiple = config.padded_vocab_size, 1
            rows = math.ceil(new_num_tokens / multiple) * multiple
            return super().resize_token_embeddings(rows, mean_resizing=mean_resizing)
        finally:
            config.vocab_size, config.pad_vocab_size_multiple = new_num_tokens, multiple

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load as transformers does, but refuse weights that do not fit the model, where transformers only logs a report.

        If another class saved the checkpoint, its head may differ: a missing head is initialized, a foreign one dropped.
        Names are not checked for adapters, quantized weights, a `state_dict` without folder, and with
        `output_loading_info=True`, which returns the names of missing and unexpected weights for the caller to check.

        Raises:
            CheckpointMismatchError: Weights are missing, unexpected, or (unless `ignore_mismatched_sizes=True`) of
                another shape; the message names them.
        """
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        output_loading_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        folder = pretrained_model_name_or_path
        other_weights = folder is None or model._hf_peft_config_loaded or hasattr(model, "hf_quantizer")
        check_loaded_weights(model, info, folder, ignore_mismatched_sizes, output_loading_info or other_weights)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, with an `auto_map` that names every head, so that any Auto class loads the folder."""
        if self.is_remote_code():
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)


class ScratchGPTModel(ScratchGPTPreTrainedModel):
    """The backbone: embeddings, blocks and the final norm. It returns hidden states, not logits."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        config.validate_architecture()  # again: its fields may have been set since it was built
        self.wte = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding_type == "rope":
            self.rotary_emb = ScratchGPTRotaryEmbedding(config)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.h = nn.ModuleList([ScratchGPTBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.ln_f = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states (batch, seq, hidden) after the final norm.

        Args:
            input_ids: Token ids (batch, seq). Exactly one of `input_ids` and `inputs_embeds` is needed.
            attention_mask: 1 for real tokens and 0 for padding (batch, kv_seq); or a 4D mask; or one per layer type.
            position_ids: Positions (batch or 1, seq). Without mask and cache, a position that does not follow the
                previous one starts a new document, and documents do not attend to each other (packed sequences).
            past_key_values: Cached keys and values of previous tokens.
            inputs_embeds: Embeddings (batch, seq, hidden) instead of `input_ids`.
            use_cache: Whether to return a cache. None is created in training or for packed sequences.

        Raises:
            ValueError: Neither or both inputs; a token id outside the vocabulary or a position beyond the learned ones
                (on CPU); a sequence longer than the learned positions; an attention mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids)  # (batch, seq, hidden)
        self._check_attention_mask(attention_mask, inputs_embeds, past_key_values)

        if use_cache and past_key_values is None and not self.training and not _is_packed(position_ids, attention_mask):
            past_key_values = DynamicCache(config=self.config)

        # The mask functions look for packed documents in the positions; default positions have none.
        given_position_ids = position_ids
        if position_ids is None:
            position_ids = self._default_position_ids(attention_mask, inputs_embeds, past_key_values)

        causal_masks = attention_mask
        if not isinstance(causal_masks, dict):  # `generate` may have prepared them
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": given_position_ids,
            }
            causal_masks = {"full_attention": create_causal_mask(**mask_kwargs)}
            if "sliding_attention" in self.config.layer_types:
                causal_masks["sliding_attention"] = create_sliding_window_causal_mask(**mask_kwargs)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.position_embedding_type == "learned":
            hidden_states = hidden_states + self._embed_positions(position_ids)
        elif self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.drop(hidden_states)

        for layer_idx, block in enumerate(self.h[: self.config.num_hidden_layers]):
            hidden_states = block(
                hidden_states,
                attention_mask=causal_masks[self.config.layer_types[layer_idx]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        if is_tracing(input_ids):
            return self.wte(input_ids)
        vocab_size = self.config.vocab_size
        try:  # checking first would cost a pass over the ids, and on CUDA a synchronization
            embeddings = self.wte(input_ids)
            has_padding = self.wte.num_embeddings > vocab_size
            if not (has_padding and input_ids.device.type == "cpu" and (input_ids >= vocab_size).any()):
                return embeddings
        except IndexError:
            pass
        raise ValueError(
            f"input_ids range from {input_ids.min().item()} to {input_ids.max().item()}, but vocab_size={vocab_size}: "
            f"ids must lie in [0, {vocab_size - 1}] (is this the tokenizer of another model?)"
        )

    def _embed_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        if is_tracing(position_ids):
            return self.wpe(position_ids)
        try:
            return self.wpe(position_ids)
        except IndexError:
            raise ValueError(self._too_long(position_ids.max().item() + 1)) from None

    def _too_long(self, length: int) -> str:
        return (
            f"the sequence reaches a length of {length} tokens, but there are only max_position_embeddings="
            f"{self.config.max_position_embeddings} learned positions: shorten it, or train with more positions"
        )

    def _default_position_ids(
        self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions (batch or 1, seq) that continue those of the cache; learned ones do not count padding on the left."""
        seq = inputs_embeds.shape[1]
        if (
            self.config.position_embedding_type == "learned"
            and isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 2
        ):
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
            return positions.to(inputs_embeds.device)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0  # a tensor for static caches
        has_limit = self.config.position_embedding_type == "learned" and not is_tracing(inputs_embeds)
        if has_limit and isinstance(past, int) and past + seq > self.config.max_position_embeddings:
            raise ValueError(self._too_long(past + seq))
        return (torch.arange(seq, device=inputs_embeds.device) + past).unsqueeze(0)

    @staticmethod
    def _check_attention_mask(attention_mask, inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or is_tracing(inputs_embeds):
            return
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        batch, seq = inputs_embeds.shape[:2]
        # A static cache (whose length is a tensor) may have a mask of its full size.
        if isinstance(past, int) and attention_mask.shape != (batch, past + seq):
            cached = f" and the cache holds {past} more" if past else ""
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but the input has (batch, seq) = "
                f"{(batch, seq)}{cached}: give one 0 or 1 per token"
            )


def _is_packed(position_ids: torch.Tensor | None, attention_mask) -> bool:
    """Whether positions restart inside a sequence. With a cache, transformers makes no mask between its documents."""
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] == 1 or is_tracing(position_ids):
        return False
    return find_packed_sequence_indices(position_ids) is not None


class ScratchGPTTaskModel(ScratchGPTPreTrainedModel):
    """Base of the models with a head: the backbone, and the forward pass of the classification heads.

    transformers' generic heads fail under `trust_remote_code`. Signatures are repeated, because transformers reads them.
    """

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.transformer = ScratchGPTModel(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """Compute the scores of the head and, with labels, the loss. The other arguments are those of `ScratchGPTModel`."""
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return self._classify(outputs, labels, input_ids, attention_mask)


class ScratchGPTForCausalLM(ScratchGPTTaskModel, GenerationMixin):
    """The language model: the backbone and a linear head over the vocabulary, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.lm_head = build_linear(config, config.hidden_size, config.padded_vocab_size, bias=False)
        self._in_forward = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute the logits (batch, seq, vocab) and, with labels, the mean next-token cross-entropy in nats.

        Args:
            labels: Token ids (batch, seq), shifted inside; -100 marks tokens without loss. `shift_labels=` passes labels
                that are shifted already; `num_items_in_batch=` divides the sum of the losses instead of their count.
            logits_to_keep: Compute logits for the last n positions only (0: all), or for the positions of a tensor.
            skip_logits: Compute the loss without ever holding all logits, and return none. Default (`None`): when
                training with labels. `False` returns both loss and logits.

        The other arguments are those of `ScratchGPTModel`.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = _select_positions(outputs.last_hidden_state, logits_to_keep)

        targets = labels if labels is not None else kwargs.get("shift_labels")
        has_labels = targets is not None
        if has_labels:
            check_labels(targets, self.config.vocab_size, "vocab_size", kwargs.get("ignore_index", -100))
        if skip_logits is None:
            skip_logits = self.training and has_labels
        logits, loss = None, None
        if skip_logits and has_labels and self._can_skip_logits():
            loss = causal_lm_loss_without_logits(
                hidden_states,
                self.lm_head,
                labels,
                softcap=self.config.final_logit_softcapping,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        else:
            logits = self.lm_head(hidden_states)[..., : self.config.vocab_size]  # (batch, seq, vocab)
            if (cap := self.config.final_logit_softcapping) is not None:
                logits = cap * torch.tanh(logits / cap)
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _can_skip_logits(self) -> bool:
        """Whether the head is one local matrix and the loss the standard one; otherwise the loss needs the logits."""
        return (
            type(self.lm_head) in (nn.Linear, ScratchGPTLinear)
            and type(self.lm_head.weight) in (nn.Parameter, torch.Tensor)
            and not hasattr(self, "_loss_function")
        )

    def __call__(self, *args, **kwargs):
        self._in_forward = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._in_forward = False

    def get_output_embeddings(self) -> nn.Module:
        """Return the head; inside of a forward pass, without the rows that pad the vocabulary.

        TRL replaces `forward` by one that multiplies by this weight itself, and must not see the padding. Other callers need
        the module with the parameters: PEFT and quantizers to skip it, Accelerate to shard it with its tied embedding.
        """
        head, vocab_size = self.lm_head, self.config.vocab_size
        if self.config.padded_vocab_size == vocab_size or not self._in_forward:
            return head
        unpadded = nn.Linear(head.in_features, vocab_size, bias=False, device="meta")
        del unpadded.weight
        unpadded.weight = head.weight[:vocab_size]
        return unpadded


def _select_positions(hidden_states: torch.Tensor, selected: int | torch.Tensor) -> torch.Tensor:
    """Select the hidden states (batch, seq, hidden) whose logits are needed.

    `selected` is the number of positions at the end, 0 for all; or positions (kept,) or (batch, kept); or a mask (batch, seq),
    which gives (kept, hidden). transformers has this function from 5.21 on, but vLLM requires an earlier version.
    """
    if isinstance(selected, int):
        return hidden_states[:, slice(-selected, None)]
    if selected.ndim == 1:
        return hidden_states[:, selected]
    if selected.dtype == torch.bool:
        return hidden_states[selected]
    return torch.take_along_dim(hidden_states, selected[..., None], dim=1)


class ScratchGPTForSequenceClassification(ScratchGPTTaskModel):
    """`num_labels` scores per sequence, read at its last token. With one label: a reward model.

    The loss is that of `config.problem_type`. The last token of a sequence is the last one that its attention mask admits
    (so an end-of-text token counts even if it is the padding token, too); without a mask, the last that is not
    `pad_token_id`.

    Raises:
        ValueError: Several sequences, but neither attention mask nor `pad_token_id` to find their ends.
    """

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _classify(self, outputs, labels, input_ids, attention_mask) -> SequenceClassifierOutputWithPast:
        logits = self.score(outputs.last_hidden_state)  # (batch, seq, num_labels)
        batch, seq = logits.shape[:2]

        real_tokens = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            real_tokens = attention_mask[:, -seq:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real_tokens = input_ids != self.config.pad_token_id
        elif batch != 1 and input_ids is not None:
            raise ValueError(
                f"the batch has {batch} sequences, but neither attention_mask nor config.pad_token_id shows where they end"
            )
        if real_tokens is None:
            pooled_logits = logits[:, -1]
        else:
            last_token = (real_tokens.to(logits.device) * torch.arange(seq, device=logits.device)).argmax(-1)
            pooled_logits = logits[torch.arange(batch, device=logits.device), last_token]  # (batch, num_labels)

        loss = None
        if labels is not None:
            if self.num_labels > 1 and self.config.problem_type in (None, "single_label_classification"):
                check_labels(labels, self.num_labels, "num_labels")
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss, pooled_logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )


class ScratchGPTForTokenClassification(ScratchGPTTaskModel):
    """`num_labels` scores for every token and, with labels (batch, seq), their mean cross-entropy."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _classify(self, outputs, labels, input_ids, attention_mask) -> TokenClassifierOutput:
        logits = self.score(self.dropout(outputs.last_hidden_state))  # (batch, seq, num_labels)
        loss = None
        if labels is not None:
            check_labels(labels, self.num_labels, "num_labels")
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ScratchGPTForQuestionAnswering(ScratchGPTTaskModel):
    """Two scores for every token: that an answer starts there, and that it ends there (Devlin et al. 2018, section 4.2)."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Compute start and end scores, each (batch, seq), and, with both positions (batch,), the mean of their
        cross-entropies. A position beyond the sequence is ignored.
        """
        labels = None if start_positions is None or end_positions is None else (start_positions, end_positions)
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, **kwargs
        )

    def _classify(self, outputs, labels, input_ids, attention_mask) -> QuestionAnsweringModelOutput:
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = self.loss_function(start_logits, end_logits, *labels) if labels is not None else None
        return QuestionAnsweringModelOutput(
            loss, start_logits, end_logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# Trainer shifts the labels for label smoothing only for classes in this table, which registration with the Auto classes does
# not fill. Code loaded with `trust_remote_code` is not registered otherwise, so the entry stands in this file.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(ScratchGPTConfig.model_type, ScratchGPTForCausalLM.__name__)


__all__ = [
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
]
