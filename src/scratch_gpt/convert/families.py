"""The same model in transformers' own classes, and back.

    from scratch_gpt.convert.families import from_hf, to_hf

    ours = from_hf("path/of/a/llama")            # a folder, a name on the Hub, or a model in memory
    stock = to_hf(ours, "auto")                  # the first stock class that can express it, here LlamaForCausalLM

Nothing is approximated: the logits are the same to float rounding, and a model that no stock class can express is
refused with the fields that stand in the way. Each family is one `Family` below: the fields it shares with
`ScratchGPTConfig`, the ones where it has no choice, and its weights. Both directions read the same table.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig
from scratch_gpt.model.modeling_scratch_gpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTPreTrainedModel,
)

logger = transformers.utils.logging.get_logger(__name__)

OUR_CLASSES = {"CausalLM": ScratchGPTForCausalLM, "SequenceClassification": ScratchGPTForSequenceClassification}

# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One matrix or vector of theirs (or both, `.weight` and `.bias`), and ours that it holds one below the other."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    """GPT-2 stores its projections as (in, out)."""


@dataclass(frozen=True)
class Family:
    """What one architecture of transformers can express, in our terms."""

    model_type: str
    class_names: dict[str, str]
    """Our head: their class."""
    fields: dict[str, str]
    """Our config field: theirs, copied both ways."""
    fixed: dict[str, Any]
    """Our config field: the only value that this architecture has."""
    weights: tuple[Weight, ...]
    limits: tuple[Callable[[ScratchGPTConfig], str | None], ...] = ()
    """Further demands on our config: what is wrong with it, or None."""
    their_limits: tuple[tuple[str, Any], ...] = ()
    """Fields of theirs that we can express with this value only."""
    uses_window: bool = False
    """Whether `layer_types` is theirs as well, with `use_sliding_window` to switch it on."""


def _names(*pairs: tuple[str, str]) -> tuple[Weight, ...]:
    return tuple(Weight(theirs, (ours,)) for theirs, ours in pairs)


LLAMA_WEIGHTS = _names(
    ("model.embed_tokens", "transformer.wte"),
    ("model.layers.*.input_layernorm", "transformer.h.*.ln_1"),
    ("model.layers.*.self_attn.q_proj", "transformer.h.*.attn.q_proj"),
    ("model.layers.*.self_attn.k_proj", "transformer.h.*.attn.k_proj"),
    ("model.layers.*.self_attn.v_proj", "transformer.h.*.attn.v_proj"),
    ("model.layers.*.self_attn.o_proj", "transformer.h.*.attn.o_proj"),
    ("model.layers.*.self_attn.q_norm", "transformer.h.*.attn.q_norm"),
    ("model.layers.*.self_attn.k_norm", "transformer.h.*.attn.k_norm"),
    ("model.layers.*.post_attention_layernorm", "transformer.h.*.ln_2"),
    ("model.layers.*.mlp.gate_proj", "transformer.h.*.mlp.gate_proj"),
    ("model.layers.*.mlp.up_proj", "transformer.h.*.mlp.up_proj"),
    ("model.layers.*.mlp.down_proj", "transformer.h.*.mlp.down_proj"),
    ("model.norm", "transformer.ln_f"),
    ("lm_head", "lm_head"),
    ("score", "score"),
)

GPT2_WEIGHTS = (
    *_names(
        ("transformer.wte", "transformer.wte"),
        ("transformer.wpe", "transformer.wpe"),
        ("transformer.h.*.ln_1", "transformer.h.*.ln_1"),
        ("transformer.h.*.ln_2", "transformer.h.*.ln_2"),
        ("transformer.ln_f", "transformer.ln_f"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    Weight("transformer.h.*.attn.c_attn", tuple(f"transformer.h.*.attn.{x}_proj" for x in "qkv"), transposed=True),
    Weight("transformer.h.*.attn.c_proj", ("transformer.h.*.attn.o_proj",), transposed=True),
    Weight("transformer.h.*.mlp.c_fc", ("transformer.h.*.mlp.up_proj",), transposed=True),
    Weight("transformer.h.*.mlp.c_proj", ("transformer.h.*.mlp.down_proj",), transposed=True),
)

_SHARED_FIELDS = {
    name: name
    for name in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        *("hidden_act", "attention_dropout", "initializer_range", "tie_word_embeddings", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
}
_LLAMA_FIELDS = {
    **_SHARED_FIELDS,
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "rope_parameters": "rope_parameters",
}
_LLAMA_FIXED = {
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
    "norm_bias": False,
    "mlp_type": "gated",
    "qk_norm": False,
    "final_logit_softcapping": None,
}


def _all_layers_rotate(config: ScratchGPTConfig) -> str | None:
    if config.no_rope_layers is not None and 0 in config.no_rope_layers:
        return f"no_rope_layers={config.no_rope_layers}: every layer there has rotary positions"
    return None


def _no_window(config: ScratchGPTConfig) -> str | None:
    if "sliding_attention" in config.layer_types:
        return f'layer_types with "sliding_attention" (sliding_window={config.sliding_window}): it has none'
    return None


def _one_kind_of_layer(config: ScratchGPTConfig) -> str | None:
    if len(set(config.layer_types)) > 1:
        return "layer_types of two kinds: all of its layers slide or none does"
    return None


def _one_attention_bias(config: ScratchGPTConfig) -> str | None:
    if config.attention_out_bias != config.attention_bias:
        return (
            f"attention_out_bias={config.attention_out_bias} with attention_bias={config.attention_bias}: "
            "one switch there sets both"
        )
    return None


def _width_is_a_multiple_of_heads(config: ScratchGPTConfig) -> str | None:
    if config.hidden_size % config.num_attention_heads:
        return (
            f"hidden_size={config.hidden_size} with num_attention_heads={config.num_attention_heads}: "
            "the heads must divide the width"
        )
    return None


def _heads_fill_the_width(config: ScratchGPTConfig) -> str | None:
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        return f"head_dim={config.head_dim}: it must be hidden_size / num_attention_heads"
    return None


def _no_grouped_queries(config: ScratchGPTConfig) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return f"num_key_value_heads={config.num_key_value_heads}: it must be num_attention_heads"
    return None


def _classes(prefix: str, language_model: str = "ForCausalLM") -> dict[str, str]:
    return {"CausalLM": prefix + language_model, "SequenceClassification": f"{prefix}ForSequenceClassification"}


# In the order in which `auto` tries them.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gpt2",
            class_names=_classes("GPT2", "LMHeadModel"),
            fields={
                **_SHARED_FIELDS,
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
                "intermediate_size": "n_inner",
                "hidden_act": "activation_function",
                "attention_dropout": "attn_pdrop",
                "hidden_dropout": "resid_pdrop",
                "embedding_dropout": "embd_pdrop",
                "layer_norm_epsilon": "layer_norm_epsilon",
            },
            fixed={
                "position_embedding_type": "learned",
                "norm_type": "layernorm",
                "norm_bias": True,
                "mlp_type": "plain",
                "mlp_bias": True,
                "attention_bias": True,
                "attention_out_bias": True,
                "qk_norm": False,
                "final_logit_softcapping": None,
            },
            weights=GPT2_WEIGHTS,
            limits=(_heads_fill_the_width, _no_grouped_queries, _no_window),
            their_limits=(
                ("scale_attn_weights", True),
                ("scale_attn_by_inverse_layer_idx", False),
                ("add_cross_attention", False),
            ),
        ),
        Family(
            model_type="llama",
            class_names=_classes("Llama"),
            fields={
                **_LLAMA_FIELDS,
                "head_dim": "head_dim",
                "attention_bias": "attention_bias",
                "mlp_bias": "mlp_bias",
            },
            fixed=_LLAMA_FIXED,
            weights=LLAMA_WEIGHTS,
            limits=(_width_is_a_multiple_of_heads, _one_attention_bias, _all_layers_rotate, _no_window),
        ),
        Family(
            model_type="qwen3",
            class_names=_classes("Qwen3"),
            fields={**_LLAMA_FIELDS, "head_dim": "head_dim", "attention_bias": "attention_bias"},
            fixed={**_LLAMA_FIXED, "qk_norm": True, "mlp_bias": False},
            weights=LLAMA_WEIGHTS,
            limits=(_one_attention_bias, _all_layers_rotate),
            uses_window=True,
        ),
        Family(
            model_type="qwen2",
            class_names=_classes("Qwen2"),
            fields={**_LLAMA_FIELDS, "head_dim": "head_dim"},
            fixed={**_LLAMA_FIXED, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            weights=LLAMA_WEIGHTS,
            limits=(_all_layers_rotate,),
            uses_window=True,
        ),
        Family(
            model_type="mistral",
            class_names=_classes("Mistral"),
            fields={**_LLAMA_FIELDS, "head_dim": "head_dim"},
            fixed={**_LLAMA_FIXED, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
            weights=LLAMA_WEIGHTS,
            limits=(_all_layers_rotate, _one_kind_of_layer),
        ),
        Family(
            model_type="smollm3",
            class_names=_classes("SmolLM3"),
            fields={
                **_LLAMA_FIELDS,
                "head_dim": "head_dim",
                "attention_bias": "attention_bias",
                "mlp_bias": "mlp_bias",
                "no_rope_layers": "no_rope_layers",
            },
            fixed=_LLAMA_FIXED,
            weights=LLAMA_WEIGHTS,
            limits=(_one_attention_bias,),
            uses_window=True,
        ),
    )
}

# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


def obstacles(config: ScratchGPTConfig, family: Family) -> list[str]:
    """What keeps `family` from expressing `config`: one line per field, none if it can."""
    found = [
        f"{name}={getattr(config, name)!r}: it has {value!r} only"
        for name, value in family.fixed.items()
        if getattr(config, name) != value
    ]
    return found + [problem for limit in family.limits if (problem := limit(config)) is not None]


def choose_family(config: ScratchGPTConfig, to: str = "auto") -> Family:
    """The family called `to`, or the first that can express `config`.

    Raises:
        ValueError: no such family, or the fields that stand in the way.
    """
    if to != "auto" and to not in FAMILIES:
        raise ValueError(f"no family {to!r}: the choices are auto, {', '.join(FAMILIES)}")
    refusals = []
    for name in FAMILIES if to == "auto" else [to]:
        problems = obstacles(config, FAMILIES[name])
        if not problems:
            return FAMILIES[name]
        refusals.append(f"  {FAMILIES[name].class_names['CausalLM']}: " + "; ".join(problems))
    subject = "no stock class can" if to == "auto" else "this stock class cannot"
    raise ValueError(f"{subject} express this model, because of\n" + "\n".join(refusals))


def to_hf_config(config: ScratchGPTConfig, to: str = "auto", head: str = "CausalLM") -> PreTrainedConfig:
    """The config of the stock class that expresses `config`; a `ValueError` names the fields that no class can."""
    family = choose_family(config, to)
    fields = {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    for name in ("hidden_dropout", "embedding_dropout"):
        if name not in family.fields and getattr(config, name):
            logger.warning(f"{name}={getattr(config, name)} is left behind: {family.model_type} has no such dropout.")
    if family.model_type == "smollm3" and config.no_rope_layers is None:
        fields["no_rope_layers"] = [1] * config.num_hidden_layers
    if family.model_type == "mistral":
        fields["sliding_window"] = config.sliding_window if "sliding_attention" in config.layer_types else None
    if family.uses_window:
        fields["layer_types"] = list(config.layer_types)
        fields["use_sliding_window"] = "sliding_attention" in config.layer_types
        fields["sliding_window"] = config.sliding_window if fields["use_sliding_window"] else None
    if isinstance(fields.get("rope_parameters"), dict):
        fields["rope_parameters"] = dict(fields["rope_parameters"])
    if head == "SequenceClassification":
        fields["num_labels"] = config.num_labels
    stock = AutoConfig.for_model(family.model_type, **fields)
    stock.architectures, stock.dtype = [family.class_names[head]], config.dtype
    return stock


def from_hf_config(config: PreTrainedConfig) -> ScratchGPTConfig:
    """Our config of a stock one. A `ValueError` names the model type, or the field, that cannot be expressed."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type={config.model_type!r} is none of those that convert: {', '.join(FAMILIES)}")
    family = FAMILIES[config.model_type]
    problems = [
        f"{name}={getattr(config, name)!r}: only {value!r} can be expressed"
        for name, value in family.their_limits
        if getattr(config, name) != value
    ]
    if problems:
        raise ValueError(f"this {config.model_type} model cannot be converted, because of " + "; ".join(problems))

    fields = {**family.fixed, **{ours: getattr(config, theirs, None) for ours, theirs in family.fields.items()}}
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if family.model_type == "mistral" and window is not None:
        fields |= {"sliding_window": window, "layer_types": ["sliding_attention"] * layers}
    if family.uses_window and "sliding_attention" in config.layer_types:
        fields |= {"sliding_window": window, "layer_types": list(config.layer_types)}
    if fields.get("no_rope_layers") == [1] * layers:
        fields["no_rope_layers"] = None
    if fields.get("attention_dropout") is None:
        fields["attention_dropout"] = 0.0
    return ScratchGPTConfig(**fields, num_labels=config.num_labels, dtype=config.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the result is made from tensors of the source."""

    target: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool
    part: tuple[int, int] | None = None
    """(index, number): which of several equal parts of the source it is."""

    def make(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor, contiguous and in memory of its own.

        Raises:
            ValueError: The source's tensor has another shape than its config says.
        """
        tensors = [read(name) for name in self.sources]
        if self.part is None:
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            tensor = tensor.t() if self.transposed and tensor.ndim == 2 else tensor
        else:
            tensor = tensors[0].t() if self.transposed and tensors[0].ndim == 2 else tensors[0]
            tensor = tensor.chunk(self.part[1])[self.part[0]]
        if _is_vocabulary(self.target) and tensor.shape[0] > self.shape[0]:
            tensor = tensor[: self.shape[0]]  # rows that only pad the vocabulary
        if tuple(tensor.shape) != self.shape:
            raise ValueError(
                f"{' + '.join(self.sources)} gives {self.target} the shape {tuple(tensor.shape)}, but the config says "
                f"{self.shape}: config.json and the weights are not of one model"
            )
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _is_vocabulary(name: str) -> bool:
    return name.split(".")[-2] in ("wte", "embed_tokens", "lm_head")


def recipes(target_class: type[PreTrainedModel], config: PreTrainedConfig, family: Family) -> list[Recipe]:
    """One recipe for every tensor that a saved `target_class` holds, in the order of its state dict."""
    ours_wanted = config.model_type == ScratchGPTConfig.model_type
    with torch.device("meta"):
        state = target_class(config).state_dict()
    tied = target_class._tied_weights_keys if config.tie_word_embeddings else None
    found = []
    for name, tensor in state.items():
        if name in (tied or {}):
            continue
        stem, _, suffix = name.rpartition(".")
        pattern = re.sub(r"\.\d+\.", ".*.", stem)
        layer = re.search(r"\.(\d+)\.", stem)

        def source(stem: str, layer=layer, suffix=suffix) -> str:
            return (stem.replace("*", layer.group(1)) if layer else stem) + f".{suffix}"

        for weight in family.weights:
            part: tuple[int, int] | None = None
            sources: tuple[str, ...]
            if ours_wanted and pattern in weight.ours:
                sources = (source(weight.theirs),)
                if len(weight.ours) > 1:
                    part = (weight.ours.index(pattern), len(weight.ours))
            elif not ours_wanted and pattern == weight.theirs:
                sources = tuple(source(stem) for stem in weight.ours)
            else:
                continue
            found.append(Recipe(name, tuple(tensor.shape), sources, weight.transposed, part))
            break
        else:
            raise AssertionError(f"{name} is missing from the table of {family.model_type}")
    return found


def check_names(wanted: Iterable[Recipe], available: Iterable[str], where: str) -> None:
    """A `ValueError` when tensors are missing, or left over, for reasons other than tying or a saved mask."""
    needed = {name for recipe in wanted for name in recipe.sources}
    missing = sorted(needed - set(available))
    # A tied head may be stored all the same, and old GPT-2 and Llama files carry masks and frequencies.
    harmless = re.compile(r"lm_head\.weight$|\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
    extra = sorted(name for name in set(available) - needed if not harmless.search(name))
    if missing or extra:
        problems = [f"{kind}: {_some(names)}" for kind, names in (("missing", missing), ("unknown", extra)) if names]
        raise ValueError(f"{where} does not hold the weights that its config asks for; " + "; ".join(problems))


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class SafetensorsFolder:
    """The tensors of a saved model by name, read one at a time; names of a bare backbone get its prefix."""

    def __init__(self, folder: Path, base_prefix: str, stack: ExitStack):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / name for name in weight_map.values()})
        elif single.is_file():
            files = [single]
        else:
            raise ValueError(
                f"{folder} holds neither {single.name} nor {index.name}: only safetensors are read "
                "(load other formats with transformers and save them again)"
            )
        if absent := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"{index} names files that are absent: {_some(absent)}")
        self._where = {}
        for file in files:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            for stored in reader.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                name = (
                    stored
                    if stored.startswith((f"{base_prefix}.", "lm_head.", "score."))
                    else f"{base_prefix}.{stored}"
                )
                self._where[name] = (reader, stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, name: str) -> torch.Tensor:
        reader, stored = self._where[name]
        return reader.get_tensor(stored)


@dataclass(frozen=True)
class Conversion:
    """A saved model seen as another class: its config, and recipes over tensors that are read one at a time."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    recipes: list[Recipe]
    read: Callable[[str], torch.Tensor]


@contextmanager
def open_folder(folder: Path, to: str | None) -> Iterator[Conversion]:
    """Look at the model saved in `folder` as ours (`to=None`) or, if it is ours, as the family `to`.

    Raises:
        ValueError: another kind of model, or weights that do not fit its config.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a saved model")
    source_config = AutoConfig.from_pretrained(folder)
    ours = source_config.model_type == ScratchGPTConfig.model_type
    if ours and to is None:
        raise ValueError(f"{folder} is a {source_config.model_type} model already")
    if not ours and to is not None:
        raise ValueError(f"{folder} is a {source_config.model_type} model, not one of ours: import it first")
    head = _head_of((source_config.architectures or [""])[0])
    if to is None:
        config, family = from_hf_config(source_config), FAMILIES.get(source_config.model_type)
        model_class: type[PreTrainedModel] = OUR_CLASSES[head]
        prefix = getattr(transformers, family.class_names[head]).base_model_prefix
    else:
        family = choose_family(source_config, to)
        config = to_hf_config(source_config, family.model_type, head)
        model_class, prefix = getattr(transformers, family.class_names[head]), "transformer"
    with ExitStack() as stack:
        source = SafetensorsFolder(folder, prefix, stack)
        plan = recipes(model_class, config, family)
        check_names(plan, source, str(folder))
        yield Conversion(config, model_class, plan, source.read)


def _head_of(class_name: str) -> str:
    return "SequenceClassification" if class_name.endswith("ForSequenceClassification") else "CausalLM"


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def from_hf(model_or_path: PreTrainedModel | str | Path) -> ScratchGPTPreTrainedModel:
    """A ScratchGPT model with the weights of a stock GPT-2, Llama, Mistral, Qwen2, Qwen3 or SmolLM3.

    Args:
        model_or_path: A model in memory (its weights are copied), the folder of a saved one, or its name on the Hub.

    Returns:
        The language model (or the sequence classifier, if that is what was given), in evaluation mode, in the dtype of
        the source, with its generation config.

    Raises:
        ValueError: Another kind of model, a feature that cannot be expressed, or weights that do not fit the config.
    """
    if isinstance(model_or_path, PreTrainedModel):
        stock = model_or_path
        config = from_hf_config(stock.config)
        return _convert(stock, OUR_CLASSES[_head_of(type(stock).__name__)], config, FAMILIES[stock.config.model_type])
    folder = Path(model_or_path)
    if not folder.is_dir():
        folder = _download(str(model_or_path))
    with open_folder(folder, to=None) as conversion:
        state = {recipe.target: recipe.make(conversion.read) for recipe in conversion.recipes}
    model = _build(conversion.model_class, conversion.config, state)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def to_hf(model: ScratchGPTPreTrainedModel, to: str = "auto") -> PreTrainedModel:
    """The stock model of transformers that gives the logits of `model`, which it leaves as it is.

    Args:
        to: "gpt2", "llama", "qwen3", "qwen2", "mistral", "smollm3", or "auto" for the first that can express it.

    Raises:
        ValueError: No such class can; the message names the fields that stand in the way.
    """
    head = _head_of(type(model).__name__)
    family = choose_family(model.config, to)
    config = to_hf_config(model.config, family.model_type, head)
    return _convert(model, getattr(transformers, family.class_names[head]), config, family)


def _convert(source: PreTrainedModel, target_class, config: PreTrainedConfig, family: Family):
    tensors = source.state_dict()
    plan = recipes(target_class, config, family)
    check_names(plan, tensors, type(source).__name__)
    state = {recipe.target: recipe.make(tensors.__getitem__) for recipe in plan}
    model = _build(target_class, config, state, source.config._attn_implementation)
    if model.can_generate() and getattr(source, "generation_config", None) is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(source.generation_config.to_dict())
    return model


def _build(model_class, config: PreTrainedConfig, state: dict[str, torch.Tensor], attention: str | None = None):
    dtype = next(tensor.dtype for tensor in state.values())
    return model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=attention
    ).eval()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"{name} is neither a folder here nor a model on the Hub that can be reached") from error
