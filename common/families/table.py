"""One entry for each family of models that can be run: its layer, part by part, in the order of use.

Owns everything in which families differ. A decoder made of nn.Linear, with an embedding before its
layers and a norm and lm_head behind them, is one more entry here, and one in tests/families.py.
docs/architecture.md says how to add one. Takes configs that were validated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError

Config = dict[str, Any]
#: For each layer the tokens that its attention looks back at, itself included; None for all.
Windows = list[int | None]

SLIDING, FULL = "sliding_attention", "full_attention"  # what `layer_types` may say
USUAL_WINDOW, FULL_LAYERS = 4096, 28  # transformers' own, where a config is silent
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Linear:
    """A Linear of a layer, by its name there: [rows, columns], which is [N, K], and maybe a bias."""

    name: str
    rows: int
    columns: int
    bias: bool = False


@dataclass(frozen=True)
class Kept:
    """Any other tensor of a layer, such as a norm's weights: it stays with the engine."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """What distinguishes a family.

    ``architecture``: transformers' class. ``layer``: the parts of one layer, in the order of use.
    ``groups``: Linears of a layer that are given one input, one after the other, three at most.
    ``windows``: of each layer. ``flags``: keys of the config that are true, false or absent.
    ``silent_head_dim``: what a config without head_dim means; None for hidden_size over heads.
    ``whole_heads``: hidden_size is a multiple of the heads even if head_dim says otherwise.
    ``names_kv_heads``: a config without num_key_value_heads is refused, since transformers would take
    a number that no published model has; for other families it means one for each head.
    ``stepped``: engine/step.py computes what these layers do.
    """

    model_type: str
    architecture: str
    layer: Callable[[Config], Iterator[Linear | Kept]]
    windows: Callable[[Config], Windows]
    flags: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = (_ATTENTION, _GATED)
    silent_head_dim: int | None = None
    whole_heads: bool = False
    names_kv_heads: bool = True
    stepped: bool = False


def head_dim(config: Config) -> int:
    """Elements of one head."""
    named = config.get("head_dim") or family_of(config).silent_head_dim
    return int(named or config["hidden_size"] // config["num_attention_heads"])


def described(config: Mapping[str, Any]) -> Config:
    """The config as transformers can be given it: a copy, since it writes into what it is given, and
    with head_dim as a number, since to some families null is none."""
    copied = copy.deepcopy(dict(config))
    return copied | {"head_dim": head_dim(copied)}


def attention_widths(config: Config) -> tuple[int, int]:
    """Columns of all of a layer's queries together, and of all its keys (or values)."""
    heads, size = int(config["num_attention_heads"]), head_dim(config)
    return heads * size, int(config.get("num_key_value_heads") or heads) * size


def family_of(config: Config) -> Family:
    """The family that the config is of. ConfigError if it is none of these."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {model_type!r:.40}, which is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _layer(
    config: Config,
    bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
) -> Iterator[Linear | Kept]:
    """A layer of norm, attention, norm, gated MLP. ``bias``: on q, k and v. ``head_norms``: each head's
    queries and keys have a norm."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    query, key_value = attention_widths(config)
    yield Kept("input_layernorm.weight", (hidden,))
    for name, rows in zip(_ATTENTION, (query, key_value, key_value), strict=True):
        yield Linear(name, rows, hidden, bias)
    if head_norms:
        yield Kept("self_attn.q_norm.weight", (head_dim(config),))
        yield Kept("self_attn.k_norm.weight", (head_dim(config),))
    yield Linear("self_attn.o_proj", hidden, query, out_bias)
    yield Kept("post_attention_layernorm.weight", (hidden,))
    for name in _GATED:
        yield Linear(name, middle, hidden, mlp_bias)
    yield Linear("mlp.down_proj", hidden, middle, mlp_bias)


def _qwen2_layer(config: Config) -> Iterator[Linear | Kept]:
    return _layer(config, bias=True)


def _qwen3_layer(config: Config) -> Iterator[Linear | Kept]:
    biased = config.get("attention_bias", False)
    return _layer(config, biased, biased, head_norms=True)


def _llama_layer(config: Config) -> Iterator[Linear | Kept]:
    biased = config.get("attention_bias", False)
    return _layer(config, biased, biased, config.get("mlp_bias", False))


def _no_windows(config: Config) -> Windows:
    return [None] * config["num_hidden_layers"]


def _one_window(config: Config) -> Windows:
    """Of all layers alike; a config that is silent has one, null means none."""
    return [config.get("sliding_window", USUAL_WINDOW)] * config["num_hidden_layers"]


def _switched_windows(config: Config) -> Windows:
    """If ``use_sliding_window`` says so: of the layers that ``layer_types`` names, or else of those from
    ``max_window_layers`` on."""
    layers = range(config["num_hidden_layers"])
    if not config.get("use_sliding_window", False):
        return [None for _ in layers]
    window = config.get("sliding_window", USUAL_WINDOW)
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", FULL_LAYERS)
        types = [SLIDING if layer >= first else FULL for layer in layers]
    return [window if types[layer] == SLIDING else None for layer in layers]


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen2",  # Qwen2.5 and its distillates too
            "Qwen2ForCausalLM",
            _qwen2_layer,
            _switched_windows,
            flags=("use_sliding_window",),
            stepped=True,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _qwen3_layer,
            _switched_windows,
            flags=("use_sliding_window", "attention_bias"),
            silent_head_dim=128,
            stepped=True,
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            _llama_layer,
            _no_windows,
            flags=("attention_bias", "mlp_bias"),
            whole_heads=True,
            names_kv_heads=False,
            stepped=True,
        ),
        Family("mistral", "MistralForCausalLM", _layer, _one_window, stepped=True),
    )
}
