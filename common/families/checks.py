"""What a config must obey before anything is made of it: sane sizes, and nothing that is computed otherwise.

Owns every refusal of a config.json but that of a family. Each is one line, and comes before a byte is
allocated or a tensor is read. What rotary embeddings need is in `rope`.
"""

from __future__ import annotations

from common.errors import ConfigError
from common.families.rope import require_rope
from common.families.table import FULL, SLIDING, Config, Family, family_of, head_dim
from common.families.values import is_integer, require_number, show

MAX_ELEMENTS = 1 << 40  # in one tensor; 500 GB as INT4, so anything above is a mistake
MAX_LAYERS = 4096
MAX_CONTEXT = 1 << 31  # tokens; positions are 32-bit integers
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_DTYPES = ("bfloat16", "float16", "float32")


def validate_config(config: Config) -> None:
    """Raise ConfigError, in one line, unless `config` describes a model of a known family and sane size."""
    family = family_of(config)
    for key in _SIZES:
        _require_positive(config, key)
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise ConfigError(
            f"config.json: num_hidden_layers is {show(config['num_hidden_layers'])}, "
            f"expected at most {MAX_LAYERS}"
        )
    _require_heads(config, family)
    for key in ("tie_word_embeddings", *family.flags):
        if not isinstance(config.get(key, False), bool):
            raise ConfigError(f"config.json: {key} is {show(config[key])}, expected true or false")
    _require_sane_sizes(config)
    _require_windows(config, family)
    require_rope(config)
    activation = config.get("hidden_act", ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: hidden_act is {show(activation)}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if "rms_norm_eps" in config:
        require_number(config, "rms_norm_eps", 0, 1)
    if config.get("max_position_embeddings") is not None:
        _require_positive(config, "max_position_embeddings", MAX_CONTEXT)
    model_dtype(config)


def model_dtype(config: Config) -> str | None:
    """The config's dtype, "bfloat16", "float16" or "float32"; None if it names none.

    Raises ConfigError for any other dtype.
    """
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if dtype is None:
        return None
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in _DTYPES:
        raise ConfigError(
            f"config.json: {key} is {show(dtype)}, expected one of {', '.join(_DTYPES)}"
        )
    return str(name)


def _require_positive(config: Config, key: str, most: int = MAX_ELEMENTS) -> None:
    if key not in config:
        raise ConfigError(f"config.json: {key} is missing, expected a positive integer")
    if not is_integer(config[key], 1, most):
        raise ConfigError(
            f"config.json: {key} is {show(config[key])}, expected a positive integer of at most {most}"
        )


def _require_heads(config: Config, family: Family) -> None:
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    # null means one for each head, and so does a missing key, for those families that say so
    if kv_heads is not None or ("num_key_value_heads" not in config and family.names_kv_heads):
        _require_positive(config, "num_key_value_heads")
        if heads % config["num_key_value_heads"]:
            raise ConfigError(
                f"config.json: num_attention_heads is {show(heads)}, expected a multiple of "
                f"num_key_value_heads, {config['num_key_value_heads']}"
            )
    named = config.get("head_dim")
    if named is not None or ("head_dim" in config and family.silent_head_dim):
        _require_positive(config, "head_dim")
    silent = named is None and family.silent_head_dim is None
    if (silent or family.whole_heads) and config["hidden_size"] % heads:
        since = ", since head_dim is not given" if silent else ""
        raise ConfigError(
            f"config.json: hidden_size is {show(config['hidden_size'])}, expected a multiple "
            f"of num_attention_heads, {heads}{since}"
        )
    if head_dim(config) % 2:
        raise ConfigError(
            f"config.json: heads have {head_dim(config)} elements, expected an even number, since "
            "rotary embeddings turn pairs"
        )


def _require_sane_sizes(config: Config) -> None:
    hidden = config["hidden_size"]
    for key, rows in (
        ("vocab_size", config["vocab_size"]),
        ("intermediate_size", config["intermediate_size"]),
        ("num_attention_heads", config["num_attention_heads"] * head_dim(config)),
    ):
        if rows * hidden > MAX_ELEMENTS:
            raise ConfigError(
                f"config.json: {key} {config[key]} and hidden_size {hidden} make a tensor of "
                f"{rows * hidden} elements, expected at most {MAX_ELEMENTS}"
            )


def _require_windows(config: Config, family: Family) -> None:
    window, first = config.get("sliding_window"), config.get("max_window_layers", 0)
    if window is not None and not is_integer(window, 2, MAX_CONTEXT):
        raise ConfigError(
            f"config.json: sliding_window is {show(window)}, expected null or an integer from 2 "
            f"to {MAX_CONTEXT}"
        )
    if not is_integer(first, 0, MAX_CONTEXT):
        raise ConfigError(
            f"config.json: max_window_layers is {show(first)}, expected an integer of at least 0"
        )
    types, layers = config.get("layer_types"), config["num_hidden_layers"]
    if types is None:
        return
    if not isinstance(types, list) or not all(kind in (FULL, SLIDING) for kind in types):
        raise ConfigError(
            f"config.json: layer_types is {show(types)}, expected a list of {FULL!r} and {SLIDING!r}"
        )
    if len(types) != layers:
        raise ConfigError(
            f"config.json: layer_types has {len(types)} entries, expected one for each of the "
            f"{layers} layers"
        )
    has = [SLIDING if found is not None else FULL for found in family.windows(config)]
    if types != has:
        at = next(layer for layer in range(layers) if types[layer] != has[layer])
        raise ConfigError(
            f"config.json: layer_types says {types[at]!r} of layer {at}, the other keys of a "
            f"{family.model_type} say {has[at]!r}"
        )
