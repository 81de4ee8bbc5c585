"""The baseline that a user would try first: Hugging Face accelerate's ``cpu_offload``, in bf16.

The model's weights lie in host memory, all but its first layers left out so that they fit; each
module's are copied to the device when it runs and dropped after. What a full model would take is
scaled by bytes, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.decode import Decoder, spread
from common.errors import ConfigError
from common.shared import require_host_memory
from common.store import Store

WARM_UP = 2  # passes: the prompt's, and one more


def measure(
    store: Store,
    device: torch.device,
    layers: int,
    prompt_tokens: int,
    steps: Callable[[Decoder], list[float]],
    most_tokens: int,
) -> dict[str, Any]:
    """Time tokens; ``steps`` runs the passes that are timed, ``most_tokens`` at most.

    ConfigError if accelerate is not installed, MemoryShortageError if the host is too small.
    """
    try:
        from accelerate import cpu_offload
    except ImportError as error:
        raise ConfigError(
            "the package accelerate is not installed: pip install -e '.[bench]'"
        ) from error
    full_bytes = _parameter_bytes(_skeleton(store, None))
    model, layers = _random_model(store, layers)
    model_bytes = _parameter_bytes(model)
    decoder = Decoder(
        _Offloaded(cpu_offload(model, device), device), prompt_tokens, most_tokens + 1
    )
    for _ in range(WARM_UP):
        decoder.step()
    times = spread(steps(decoder))
    return {
        "ms_per_token": times,
        "tok_per_s": round(1000 / times["median"], 4),
        "tokens": len(times["all"]),
        "layers": layers,
        "bytes_per_token": model_bytes,
        "bytes_per_s": round(model_bytes / (times["median"] / 1000)),
        "scaled": {
            "label": f"scaled from {layers} layers",
            "bytes_per_token": full_bytes,
            "ms_per_token": round(times["median"] * full_bytes / model_bytes, 3),
            "tok_per_s": round(1000 / times["median"] * model_bytes / full_bytes, 4),
        },
    }


class _Offloaded:
    """The model as a decoder needs it: its parameters are on no device that it could tell."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self.config, self.device = model, model.config, device

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)


def _skeleton(store: Store, layers: int | None) -> Any:
    """The model without weights. Its attention is what the engine takes, if it needs no extra."""
    config = AutoConfig.from_pretrained(store.path, local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config.dtype = torch.bfloat16
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return model.to(torch.bfloat16)


def _random_model(store: Store, layers: int) -> tuple[Any, int]:
    """A model of some weights in host memory, and its layers.

    Their values are constants, of a size at which activations stay finite: to draw tens of
    gigabytes would take minutes. They are written, so that every page is one of its own.
    """
    layers = min(layers, int(store.config["num_hidden_layers"]))
    model = _skeleton(store, layers)
    require_host_memory(_parameter_bytes(model), "the baseline's model")
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("norm.weight")
        parameter.data.fill_(1.0 if is_norm else 1 / math.sqrt(parameter.shape[-1]))
    return model.eval().requires_grad_(False), layers


def _parameter_bytes(model: Any) -> int:
    """What a pass moves: a matrix that two modules share is moved for both."""
    parameters = (parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
