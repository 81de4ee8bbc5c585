"""What llama.cpp calls the tensors of a decoder, in Hugging Face's names, and how it orders their rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROPE_FACTORS = "rope_freqs.weight"  # not a weight: what some models divide rotary frequencies by

_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


def hugging_face_name(name: str) -> str | None:
    """`blk.0.attn_q.weight` to `model.layers.0.self_attn.q_proj.weight`; None for what is not known."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    layer = _LAYER.fullmatch(stem)
    if layer is None:
        found = _OUTSIDE.get(stem)
        return f"{found}.{leaf}" if found else None
    found = _IN_LAYER.get(layer.group(2))
    return f"model.layers.{layer.group(1)}.{found}.{leaf}" if found else None


def unpaired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * D, ...] as Hugging Face has them, of rows as llama.cpp has them where it rotates pairs.

    In each head llama.cpp puts row i of the first half and row i of the second beside each other.
    """
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
