"""transformers' own model of a config, without weights. Knows no checkpoint and no slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from common.errors import ConfigError
from common.families import described, family_of


def hollow(
    config: Mapping[str, Any],
    where: object,
    device: torch.device,
    attention: str,
    dtype: torch.dtype | None = None,
) -> Any:
    """The model with every parameter on meta, and on ``device`` what no checkpoint holds but is computed.

    ``attention``: by transformers' names; ``dtype``: what the model says it is. ConfigError, beginning
    with ``where``, if transformers refuses the config.
    """
    architecture = getattr(transformers, family_of(dict(config)).architecture)
    try:
        made = architecture.config_class.from_dict(described(config))
        made._attn_implementation = attention
        if dtype is not None:
            made.dtype = dtype
        with torch.device("meta"):
            model = architecture(made)
        # Its frequencies, by the CPU as from_pretrained has them: a power that a GPU computes may be
        # another in the last bit, which shows in fp16 from some hundred positions on.
        model.model.rotary_emb = type(model.model.rotary_emb)(made).to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers has checks of its own, and many ways to say so
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{where}: transformers {transformers.__version__} refuses it: {reason}"
        ) from error
    return model
