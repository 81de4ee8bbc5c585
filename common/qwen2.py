"""What a Qwen2 config says about a model: its tensors, their shapes and their order of use.

Owns the expected tensor table and the checks on config.json. Knows nothing of files, of torch
or of how the model is computed; all it takes is the parsed config, as a plain dict.

It reads configs as transformers 4 writes them (`torch_dtype`, `rope_theta`, `rope_scaling`) and
as transformers 5 does (`dtype`, `rope_parameters`).
"""

from typing import Any

from common.errors import ConfigError

MAX_ELEMENTS = 1 << 40  # in one tensor; 500 GB as INT4, so anything above is a mistake
MAX_LAYERS = 4096

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_DTYPES = ("bfloat16", "float16", "float32")


def validate_config(config: dict[str, Any]) -> None:
    """Raise ConfigError, in one line, unless `config` describes a Qwen2 model of sane size."""
    model_type = config.get("model_type")
    if model_type != "qwen2":
        raise ConfigError(
            f"config.json: model_type is {_show(model_type)}, expected 'qwen2'; "
            "only the Qwen2 family (Qwen2, Qwen2.5 and their distillates) is supported"
        )
    for key in _SIZES:
        _require_positive(config, key)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    if layers > MAX_LAYERS:
        raise ConfigError(
            f"config.json: num_hidden_layers is {_show(layers)}, expected at most {MAX_LAYERS}"
        )
    kv_heads = _kv_heads(config)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads is {_show(heads)}, expected a multiple of "
            f"num_key_value_heads, {kv_heads}"
        )
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise ConfigError(
            f"config.json: hidden_size is {_show(config['hidden_size'])}, expected a multiple "
            f"of num_attention_heads, {heads}, since head_dim is not given"
        )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(
            f"config.json: tie_word_embeddings is {_show(tied)}, expected true or false"
        )
    _require_sane_sizes(config)
    _require_rope(config)
    model_dtype(config)


def is_tied(config: dict[str, Any]) -> bool:
    """Whether lm_head shares the embedding's matrix, and so has no weight of its own."""
    return bool(config.get("tie_word_embeddings", False))


def model_dtype(config: dict[str, Any]) -> str | None:
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
            f"config.json: {key} is {_show(dtype)}, expected one of {', '.join(_DTYPES)}"
        )
    return str(name)


def expected_tensors(
    config: dict[str, Any],
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """The tensors of the model that `config`, already validated, describes.

    Returns two tables. The first maps each Linear's name, without ".weight", to its (N, K), in
    the order in which a forward pass uses them: layer by layer q, k, v, o, gate, up, down, and
    lm_head last unless it is tied. The second maps each resident tensor's checkpoint name to its
    shape: embedding, norms, and the biases that Qwen2 has on q, k and v.
    """
    hidden, mid, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    query, key_value = attention_widths(config)
    linear: dict[str, tuple[int, int]] = {}
    residents: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        residents[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
            linear[f"{layer}.self_attn.{name}"] = (rows, hidden)
            residents[f"{layer}.self_attn.{name}.bias"] = (rows,)
        linear[f"{layer}.self_attn.o_proj"] = (hidden, query)
        residents[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear[f"{layer}.mlp.gate_proj"] = (mid, hidden)
        linear[f"{layer}.mlp.up_proj"] = (mid, hidden)
        linear[f"{layer}.mlp.down_proj"] = (hidden, mid)
    residents["model.norm.weight"] = (hidden,)
    if not is_tied(config):
        linear["lm_head"] = (vocab, hidden)
    return linear, residents


def attention_widths(config: dict[str, Any]) -> tuple[int, int]:
    """Columns of all of a layer's queries together, and of all its keys (or values)."""
    head_dim = _head_dim(config)
    return config["num_attention_heads"] * head_dim, _kv_heads(config) * head_dim


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _require_positive(config: dict[str, Any], key: str) -> None:
    if key not in config:
        raise ConfigError(f"config.json: {key} is missing, expected a positive integer")
    value = config[key]
    if type(value) is not int or not 0 < value <= MAX_ELEMENTS:  # bool is an int, and no size
        raise ConfigError(
            f"config.json: {key} is {_show(value)}, expected a positive integer "
            f"of at most {MAX_ELEMENTS}"
        )


def _kv_heads(config: dict[str, Any]) -> int:
    # null means ungrouped; a missing key would mean 32 to transformers, so ask for it.
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        return int(config["num_attention_heads"])
    _require_positive(config, "num_key_value_heads")
    return int(config["num_key_value_heads"])


def _head_dim(config: dict[str, Any]) -> int:
    head_dim = config.get("head_dim")
    if head_dim is None:
        return int(config["hidden_size"] // config["num_attention_heads"])
    _require_positive(config, "head_dim")
    return int(head_dim)


def _require_sane_sizes(config: dict[str, Any]) -> None:
    hidden = config["hidden_size"]
    for key, rows in (
        ("vocab_size", config["vocab_size"]),
        ("intermediate_size", config["intermediate_size"]),
        ("num_attention_heads", config["num_attention_heads"] * _head_dim(config)),
    ):
        if rows * hidden > MAX_ELEMENTS:
            raise ConfigError(
                f"config.json: {key} {config[key]} and hidden_size {hidden} make a tensor of "
                f"{rows * hidden} elements, expected at most {MAX_ELEMENTS}"
            )


def _require_rope(config: dict[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), dict | None):
            raise ConfigError(f"config.json: {key} is {_show(config[key])}, expected an object")
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    valid = isinstance(theta, int | float) and not isinstance(theta, bool) and theta > 0
    if theta is not None and not valid:
        raise ConfigError(f"config.json: rope_theta is {_show(theta)}, expected a number above 0")
