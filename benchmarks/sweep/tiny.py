"""Tiny configurations of any transformers configuration class, found by introspection.

A field is shrunk by what its name says it counts (`_RULES`), else in proportion to the hidden size.
Fields that the class derives from others (default None) are left to the class, lists with one entry a layer are
sampled so that every kind of layer is kept, and special tokens move to the ends of the small vocabulary, out of the
way of ordinary ids. `_OVERRIDES` holds the few that no rule gets right, each with its reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 128
# Ordinary ids lie in [FIRST_ID, LAST_ID): below are padding, start and end, above are the other special tokens.
FIRST_ID, LAST_ID = 4, 96
HIDDEN, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 2
POSITIONS = 64
PATCH = 8
# Kinds of image token of a model that reads images as tokens.
CODES = 8


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda default: min(default, limit)


def _exactly(size: int) -> Callable[[int], int]:
    return lambda default: size


# What an integer field counts, by the first pattern that matches all of its name, or the standard name it is an alias
# of. HEADS * HEAD_DIM == HIDDEN and an expansion of 1 satisfy what models demand of heads, of attention and of states.
_RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"type_vocab_size|task_type_vocab_size|n_langs", _at_most(4)),
    (r".*vocab_size.*|.*_vocab|entity_vocab_size", _at_most(VOCABULARY)),
    (r"(num_nextn_predict|num_mtp|num_dense|num_kv_shared)_layers|first_k_dense_replace", _at_most(1)),
    (r"(moe_|attn_|expert_)layer_(start_index|offset|interval)|attn_layer_offset", _at_most(1)),
    (r"(attn|expert)_layer_period|decoder_sparse_step|interleave_moe_layer_step|.*_every_n_layers", _at_most(2)),
    (r"moe_layer_end_index", _at_most(LAYERS - 1)),
    (r"depth|num_blocks|.*num_(hidden_|encoder_|decoder_|global_)?layers|n_layers?", _at_most(LAYERS)),
    (r"(en|de)coder_layers", _exactly(LAYERS)),
    (r"num_layers_per_stack|num_self_attends_per_block|n_layers_per_attn_res_block", _at_most(2)),
    (r"(num_|n_)?(routed_|local_)?experts|moe_num_experts|zero_expert_num|heads_per_ngram", _at_most(4)),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|index_topk_blocks", _at_most(2)),
    (r"n_group|num_expert_group|.*(shared_experts|ngroups|n_groups)", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"resampler_n_latents|latent_query_num|num_query_tokens", _at_most(4)),
    (r"o_groups|(mamba_)?expand", _at_most(1)),
    (r"index_topk|sliding_window_pattern", _at_most(4)),
    (r".*kernel.*", _at_most(10**9)),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|linear_num_key_heads|num_query_groups)", _at_most(2)),
    (
        r"n_head|attention_heads|"
        r".*(num|n|self|cross|decoder|encoder)_(self_|cross_|attention_|mamba_|linear_|value_|key_)*heads",
        _at_most(HEADS),
    ),
    (r"qk_rope_head_dim|rotary_dim", _exactly(HEAD_DIM // 2)),
    (r".*(head_dim|headdim|d_head|dim_head|head_size)|kv_channels|d_kv", _exactly(HEAD_DIM)),
    (r".*window.*|local_attention|.*chunk_(size|length)|(index_)?block_size|floor_scale", _at_most(4)),
    (
        r".*position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions|"
        r"model_max_length",
        _at_most(POSITIONS),
    ),
    (r".*(d_state|state_size)", _at_most(HEAD_DIM)),
    (r".*_rank|.*lowrank|.*per_layer_input|d_rel", _at_most(HEAD_DIM)),
    (r".*(ffn_dim|d_?ff|intermediate_size|hidden_dim|ffn_hidden_size|feed_forward_size|dim_ff|mlp_dim)", _at_most(96)),
    (r".*(hidden_size|d_model|n_embd|emb_dim|lru_width|d_ssm|adapter_(in|out)_dim).*|dim", _at_most(HIDDEN)),
)

_SPECIAL = re.compile(r".*_token_(id|index)s?|.*_(token_)?index$")
_FIRST_SPECIAL = {"pad": 0, "bos": 1, "cls": 1, "eos": 2, "sep": 2, "decoder_start": 1, "forced_eos": 2}
_IMAGE_TOKEN = r"(image|video)_token_(id|index)"
_RANDOMNESS = re.compile(r".*(drop|jitter|noise).*")
_INDEX_LIST = re.compile(r".*(_layers|_ids|_idxs|_ind(ex|ic)es)")

# What every model of the class needs and the class neither sets nor derives.
_REQUIRED = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "vocab_size": VOCABULARY,
}

# Fields that follow from others by a rule of one class only, by the name of the class.
_OVERRIDES: dict[str, dict[str, Any]] = {
    # Its forward exchanges the modules of block-sparse attention for full attention where a batch is short.
    "BigBirdConfig": {"attention_type": "original_full"},
    # Features a row for each number of patches.
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    # Names of the image token and of as many tokens as its autoencoder tells apart.
    "ChameleonConfig": {
        "vocabulary_map": {"<image>": LAST_ID + 1}
        | {f"IMGIMG{chr(ord('A') + code)}Z": LAST_ID + 2 + code for code in range(CODES)}
    },
    "ChameleonVQVAEConfig": {"num_embeddings": CODES, "base_channels": 32},
    # Rotary parameters for each kind of layer, and sections that fill half a head; its default has neither.
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    # Read by the attention, but declared by no field, or as optional.
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    # Each layer's kind is declared optional, but read.
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    # Shared experts are declared optional, but counted on.
    "Dots1Config": {"n_shared_experts": 1},
    # The channels of its autoencoder are divided into 32 groups.
    "Emu3VQVAEConfig": {"base_channels": 32, "channel_multiplier": (1, 1, 2, 2), "codebook_size": CODES},
    "Emu3Config": {
        "vocabulary_map": {"<image>": LAST_ID + 1}
        | {f"<|visual token {code:06}|>": LAST_ID + 2 + code for code in range(CODES)}
    },
    # Positions are counted from the padding token.
    "EsmConfig": {"pad_token_id": 0},
    # One entry for each of its four stages.
    "Florence2VisionConfig": {
        "embed_dim": (32, 32, 64, 64),
        "num_heads": (2, 2, 4, 4),
        "num_groups": (2, 2, 4, 4),
        "depths": (1, 1, 1, 1),
        "projection_dim": HIDDEN,
    },
    # As many places as a tiny image has patches.
    "Gemma3Config": {"mm_tokens_per_image": 4},
    # Tokens are pooled before the indexer chooses among them.
    "Glm5NextTextConfig": {"index_kpool": 2, "qk_rope_head_dim": 0},
    # Layer kinds come from pairs of (pattern, repetitions).
    "GPTNeoConfig": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "JanusVisionConfig": {"projection_dim": HIDDEN, "num_image_tokens": 16},
    # Four patches become one of four times the width.
    "Llama4VisionConfig": {"intermediate_size": 4 * HIDDEN},
    "MllamaVisionConfig": {"vision_output_dim": 2 * HIDDEN},
    "MuseGlimmerConfig": {"out_hidden_size": 4 * HIDDEN},
    "MuseSparkConfig": {"out_hidden_size": 4 * HIDDEN},
    # The kinds of layer that its own field does not name, which leaves it None.
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    # Must equal a field of the configuration around it.
    "RadioConfig": {"video_temporal_patch_size": 2},
    # Its output has one position for each of its positions, whatever the input.
    "PerceiverConfig": {"max_position_embeddings": 12},
    # The indexer is declared optional, but the class builds layers of no other kind of attention.
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    # Axial positions fix the sequence length in training.
    "ReformerConfig": {"axial_pos_embds": False},
    # Some layers have windows, whose size is declared optional.
    "Step3p7TextConfig": {"sliding_window": 4},
    "T5Gemma2EncoderConfig": {"mm_tokens_per_image": 4},
    # The start of a decoder's sequence, which its class reads and does not declare.
    "UdopConfig": {"decoder_start_token_id": 0},
    # As many places as a tiny image has patches.
    "ShieldGemma2Config": {"mm_tokens_per_image": 4},
    # Read where token types are counted, and declared by no field.
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": LAST_ID + 1},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": LAST_ID + 1},
    # Read of the whole, declared by its parts.
    "VisionEncoderDecoderConfig": {"pad_token_id": 0, "decoder_start_token_id": 1},
    # Widths are rounded up to multiples of 64.
    "xLSTMConfig": {"hidden_size": 2 * HIDDEN},
    # Adapters are chosen by language.
    "XmodConfig": {"default_language": "en_XX"},
    # The layers that share their weights are at least two.
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


def tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A configuration of the class with a few small layers, one of each kind, and no randomness.

    Sizes keep the divisibility that models ask for. Every dropout, jitter and layer-drop probability is 0.

    Raises:
        whatever the class raises where no tiny configuration satisfies it.
    """
    config = config_class(**tiny_fields(config_class))
    for name, undeclared in _OVERRIDES.get(config_class.__name__, {}).items():
        if not hasattr(config, name):
            setattr(config, name, undeclared)
    return config


def tiny_fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The fields `tiny_config` sets: name and small value, nested configurations built."""
    default = config_class()
    standard = {alias: name for name, alias in config_class.attribute_map.items()}
    fields = {
        field.name: vars(default)[field.name]
        for field in dataclasses.fields(config_class)
        if field.init and field.name in vars(default)
    }
    derived = {field.name for field in dataclasses.fields(config_class) if field.default is None}
    heads = {fields[name] for name in fields if standard.get(name, name) == "num_attention_heads"}
    width = next((fields[name] for name in fields if standard.get(name, name) == "hidden_size"), None)
    tiny: dict[str, Any] = {}
    for name, was in fields.items():
        if isinstance(was, PretrainedConfig):
            tiny[name] = tiny_config(type(was))
        elif _RANDOMNESS.fullmatch(name) and isinstance(was, (int, float)) and not isinstance(was, bool):
            tiny[name] = type(was)(0)
        elif type(was) is int and name not in derived and not _SPECIAL.fullmatch(name):
            tiny[name] = _shrunk(name, standard.get(name, name), was, width)
        elif was is None and name in _REQUIRED:
            tiny[name] = _REQUIRED[name]
        if name == "num_key_value_heads" and was in heads:
            tiny[name] = HEADS
    if {"head_dim", "qk_rope_head_dim"} <= tiny.keys() and fields["head_dim"] == fields["qk_rope_head_dim"]:
        tiny["head_dim"] = tiny["qk_rope_head_dim"]  # the rotated part: rotary tables have the size of a head
    tiny.update(_image_fields(fields, tiny))
    tiny.update(_special_tokens(fields))
    tiny.update(_sampled_layers(fields, standard, tiny))
    tiny.update(_OVERRIDES.get(config_class.__name__, {}))
    return {name: size for name, size in tiny.items() if name in fields}


def _shrunk(name: str, standard: str, was: int, width: int | None) -> int:
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name) or re.fullmatch(pattern, standard):
            return rule(was)
    if was <= HIDDEN:
        return was
    share = Fraction(was, width) if width else None
    if share is not None and share.denominator <= 8 and share.numerator <= 8:
        return int(share * HIDDEN)
    return HIDDEN // 2


def rotary_sections(frequencies: int) -> list[int]:
    """Sections that divide a head's frequencies into three, the first two equal."""
    return [frequencies * 3 // 8, frequencies * 3 // 8, frequencies - 2 * (frequencies * 3 // 8)]


def _image_fields(fields: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """What a vision tower, or a model with one, says of pixels, patches and layers: images of 4 by 4 patches."""
    found: dict[str, Any] = {}
    patch = fields.get("patch_size")
    if {"image_size", "patch_size"} <= fields.keys() and (isinstance(patch, int) or _is_pair(patch)):
        found["patch_size"] = small = _each(patch, PATCH)
        found["image_size"] = _each(fields["image_size"], 4 * PATCH)
    elif isinstance(patch, int):
        small = patch
        if type(fields.get("num_patches")) is int:
            found["num_patches"] = 16
    if {"window_size", "spatial_merge_size"} <= fields.keys() and isinstance(patch, int):
        found["window_size"] = 2 * fields["spatial_merge_size"] * small  # of two merged patches by two
    for name, was in fields.items():
        if re.fullmatch(r".*feature_layers?", name) and type(was) in (int, list, tuple):
            # The last two layers are there in every tower.
            found[name] = max(was, -2) if type(was) is int else [-1 - place % LAYERS for place in range(len(was))]
        elif name == "image_grid_pinpoints":
            found[name] = [[4 * PATCH, 8 * PATCH], [8 * PATCH, 4 * PATCH]]
        elif isinstance(was, dict) and "mrope_section" in was:
            found[name] = {**was, "mrope_section": rotary_sections(HEAD_DIM // 2)}
    return found


def _is_pair(size: Any) -> bool:
    return isinstance(size, (list, tuple)) and len(size) == 2


def _each(was: Any, size: int) -> Any:
    """The size in the form of the default: a number, or one for each dimension."""
    return type(was)([size] * len(was)) if isinstance(was, (list, tuple)) else size


def _special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    """Ids inside the vocabulary, equal where they were equal."""
    special = {name: was for name, was in fields.items() if _SPECIAL.fullmatch(name) and isinstance(was, (int, list))}
    special |= {name: -1 for name, was in fields.items() if was is None and re.fullmatch(_IMAGE_TOKEN, name)}
    free = iter(range(VOCABULARY - 1, LAST_ID, -1))
    places: dict[Any, int] = {}
    moved: dict[str, Any] = {}
    for name, was in special.items():
        key = was if isinstance(was, int) else tuple(was)
        role = re.sub(r"_token_.*|_index", "", name)
        if key not in places:
            places[key] = _FIRST_SPECIAL[role] if role in _FIRST_SPECIAL else next(free)
        moved[name] = places[key] if isinstance(was, int) else [places[key]]
    return moved


def _sampled_layers(fields: dict[str, Any], standard: dict[str, str], tiny: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and the lists that say something for each layer, or which layers have a property."""
    count_name = next((name for name in fields if standard.get(name, name) == "num_hidden_layers"), None)
    if count_name is None or not isinstance(fields[count_name], int):
        return {}
    count = fields[count_name]
    sequences = {name: was for name, was in fields.items() if isinstance(was, (list, tuple))}
    chosen = {
        name: was
        for name, was in sequences.items()
        if _INDEX_LIST.fullmatch(name)
        and all(type(index) is int and 0 <= index < count for index in was)
        and len(set(was)) == len(was)  # flags, one a layer, repeat themselves
    }
    by_layer = {name: was for name, was in sequences.items() if name not in chosen and len(was) == count > 1}
    kinds = [
        tuple(str(was[layer]) for was in by_layer.values()) + tuple(layer in was for was in chosen.values())
        for layer in range(count)
    ]
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    shared = tiny.get("num_kv_shared_layers", 0) or 0
    wanted = min(count, max(LAYERS, len(first) + shared))
    sample = set(first.values())
    # Layers that attend to another modality do not run without it.
    optional = {layer for name, was in chosen.items() if "cross" in name for layer in was}
    # Shared layers are the last ones.
    spare = [*range(count - shared, count), *range(count)]
    for layer in spare:
        if len(sample) < wanted or (len(sample - optional) < LAYERS and layer not in optional):
            sample.add(layer)
    layers = sorted(sample)
    sampled: dict[str, Any] = {count_name: len(layers)}
    for name, was in by_layer.items():
        sampled[name] = type(was)(was[layer] for layer in layers)
    for name, was in chosen.items():
        sampled[name] = type(was)(place for place, layer in enumerate(layers) if layer in was)
    return sampled
