"""One optimizer step that teaches bf16 and INT4 alike, and the score of both.

Owns the master weights and the optimizer. Knows nothing of sums, clocks or files. The INT4 rule of
common/int4 is repeated here in a form that takes all weights at once and never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from demo.rows import IGNORED

BLOCK = 128
LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]
Rows = tuple[Tensor, Tensor]


def mean_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the scored tokens."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def through_int4(weights: list[Tensor]) -> list[Tensor]:
    """What INT4 leaves of float32 weights, as bf16: the rule of common/int4, all in one go."""
    flat = [F.pad(w.flatten(), (0, -w.numel() % BLOCK)) for w in weights]
    blocks = torch.cat(flat).bfloat16().view(-1, BLOCK)
    peak = blocks.abs().amax(dim=1, keepdim=True)
    # A tensor of sevens: torch would multiply by the reciprocal of a plain 7.
    scale = peak.where(peak > 0, 1) / torch.full_like(peak, 7)
    codes = (blocks / scale).round().clamp(-8, 7)
    values = (codes.float() * scale.float()).bfloat16().flatten().split([w.numel() for w in flat])
    return [v[: w.numel()].view_as(w) for v, w in zip(values, weights, strict=True)]


class Trainer:
    """Float32 master weights, and the bf16 model that computes.

    Before each step the model gets the masters' values, rounded to bf16 or sent through INT4; its
    gradients go to the masters unchanged, which makes the quantizer straight-through.
    """

    def __init__(self, model: Qwen2ForCausalLM, device: str) -> None:
        movable: Any = model  # its type takes a model where a device goes
        self.model = movable.to(device)
        self.params: list[Tensor] = list(model.parameters())
        self.masters = [p.detach().clone() for p in self.params]
        # The parameters alone: from_pretrained leaves the rotary frequencies in float32, too.
        for param in self.params:
            param.data = param.data.bfloat16()
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        self.linear = [i for i, p in enumerate(self.params) if id(p) in linear]
        groups = [
            {"params": [m for m in self.masters if m.dim() == 2], "weight_decay": 0.1},
            {"params": [m for m in self.masters if m.dim() != 2], "weight_decay": 0.0},
        ]
        fused = device.startswith("cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)

    @torch.no_grad()
    def load(self, int4: bool) -> None:
        """Give the model the masters' values."""
        torch._foreach_copy_(self.params, self.masters)
        if int4:
            values = through_int4([self.masters[i] for i in self.linear])
            torch._foreach_copy_([self.params[i] for i in self.linear], values)

    def step(self, loss_of: LossFunction, batch: Rows, rate: float, int4: bool) -> Tensor:
        """One optimizer step; the loss stays on the device, so that nothing waits for it."""
        self.load(int4)
        loss = loss_of(self.model, *batch)
        loss.backward()
        for master, param in zip(self.masters, self.params, strict=True):
            assert param.grad is not None
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def score(self, batch: Rows) -> tuple[list[float], list[float]]:
        """The fractions of sums wholly right, in bf16 and in INT4, and the two losses.

        Greedy decoding gets a sum right just when each token is the likeliest after the right
        ones before it, so one forward pass tells.
        """
        ids, targets = batch
        fractions, losses = [], []
        for int4 in (False, True):
            self.load(int4)
            logits = self.model(input_ids=ids, use_cache=False).logits.float()
            right = (logits.argmax(-1) == targets) | (targets == IGNORED)
            fractions.append(right.all(dim=1).float().mean().item())
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            losses.append(loss.item())
        return fractions, losses
