"""One token through a model whose slots are dequantized: transformers' operations, without its modules.

Between its products a layer does some thirty small operations, and to launch each takes the host longer
than the device needs to do it. So every run of them is captured, once, as a small CUDA graph. Products are
called one by one, since each weight lies elsewhere the next time, and so is attention, whose past grows.
All are the very calls, on operands of the same shapes, that the layers would make, so logits are
transformers' own to the last bit. On the CPU the same runs without graphs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.families import FAMILIES
from common.formats import PACKED
from engine.cache import PastLayer, past, short_window
from engine.client import WeightClient
from engine.linear import FedLinear

Memory = tuple[torch.Tensor, torch.Tensor]


def unfit(model: Any) -> str:
    """ "" if these steps do what the model's layers do, on whatever device, else what differs."""
    config = model.config
    if not FAMILIES[config.model_type].stepped:
        return f"there is none for the family {config.model_type}"
    if config._attn_implementation != "sdpa":  # others may want a mask
        return f"its attention is {config._attn_implementation}"
    return short_window(config)


class DenseStep:
    """The step of one model. One stream, one thread. Holds no lease between its calls."""

    def __init__(self, model: Any, client: WeightClient) -> None:
        self._model, self._client, self._dtype = model, client, model.dtype
        self._graphs = _Graphs() if model.device.type == "cuda" else None
        self._attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        layers = model.model.layers
        family = sys.modules[type(layers[0].self_attn).__module__]
        self._rotate: Callable[..., Any] = family.apply_rotary_pos_emb
        self._position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._angles: tuple[torch.Tensor, ...] = ()  # cosines and sines of the position
        # Where products go, of every layer alike: each is read before the next layer's is made.
        self._hidden = self._row(model.config.hidden_size)
        self._outs = {
            name: self._row(linear.out_features) for name, linear in _linears(layers[0]).items()
        }
        self._flat = {name: row.view(1, -1) for name, row in self._outs.items()}
        norms = [layer.input_layernorm for layer in layers] + [model.model.norm]
        self._begin = self._piece(lambda: norms[0](self._hidden).view(1, -1))
        self._gate = self._piece(lambda: self._gated(layers[0].mlp.act_fn))
        self._layers = [
            _Layer(
                layer,
                self._piece(self._adding("o", layer.post_attention_layernorm)),
                self._piece(self._adding("down", after)),
            )
            for layer, after in zip(layers, norms[1:], strict=True)
        ]

    @property
    def useful(self) -> bool:
        """Whether all slots are dequantized now. Products of packed ones are better made together."""
        return not self._client.packed

    @torch.no_grad()
    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits [1, vocabulary] of the token that follows ``token`` [1, 1], whose keys and values
        are added to ``cache``, which is to have room for them."""
        length, kept = cache.get_seq_length(), past(cache)
        if length + 1 > kept[0].capacity:
            raise ValueError(f"the cache holds {kept[0].capacity} tokens, and all are there")
        self._prepare(token, length)
        x = self._begin()
        for layer, memory in zip(self._layers, kept, strict=True):
            x = self._run(layer, memory, x, length)
        logits: torch.Tensor = self._model.lm_head(x.view(1, 1, -1))
        for memory in kept:
            memory.set_length(length + 1)
        return logits[:, -1]

    def _prepare(self, token: torch.Tensor, length: int) -> None:
        """What all layers read: the token's embedding, its position, and the angles of that."""
        model = self._model.model
        self._hidden.copy_(model.embed_tokens(token))
        self._position.fill_(length)
        angles = model.rotary_emb(self._hidden, self._position[None])
        if not self._angles:
            self._angles = tuple(map(torch.empty_like, angles))
        for mine, new in zip(self._angles, angles, strict=True):
            mine.copy_(new)

    def _run(self, layer: _Layer, kept: PastLayer, x: torch.Tensor, length: int) -> torch.Tensor:
        assert kept.memory is not None
        for name in ("q", "k", "v"):
            self._product(layer, name, x)
        if layer.keys() is not kept.memory[0]:  # the cache is another, or has grown
            memory = kept.memory
            layer.keys = weakref.ref(memory[0])
            layer.place = self._piece(lambda: self._placed(layer, memory))
        query = layer.place()
        keys, values = (part[:, :, : length + 1] for part in kept.memory)
        module = layer.attention
        found, _ = self._attention(
            module, query, keys, values, None, dropout=0.0, scaling=module.scaling
        )
        self._product(layer, "o", found.reshape(1, -1))
        x = layer.middle()
        self._product(layer, "gate", x)
        self._product(layer, "up", x)
        self._product(layer, "down", self._gate())
        return layer.end()

    def _product(self, layer: _Layer, name: str, x: torch.Tensor) -> None:
        """What nn.Linear computes, into memory of its own, so that graphs find it there."""
        linear, out = layer.linears[name], self._flat[name]
        lease = self._client.acquire(linear.weight_index)
        try:
            if lease.grant.format == PACKED:  # the slots have just been swapped
                out.copy_(linear.multiply(x, lease))
                return
            weight = lease.weight(self._dtype, layer.shapes[name]).t()
            if linear.bias is None:
                torch.mm(x, weight, out=out)
            else:
                torch.addmm(linear.bias, x, weight, out=out)
        finally:
            self._client.release(lease)

    # Pieces: what is captured. They read and write memory that stays where it is. -----------------

    def _placed(self, layer: _Layer, memory: Memory) -> torch.Tensor:
        """Turn q and k by the position's angles, after their norms if there are any; k and v go where the
        past is kept. q is the result."""
        attention = layer.attention
        q, k, v = (self._outs[name].view(1, 1, -1, attention.head_dim) for name in ("q", "k", "v"))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        q, k = self._rotate(q, k, *self._angles)
        for part, states in zip(memory, (k, v), strict=True):
            part.index_copy_(2, self._position, states)
        turned: torch.Tensor = q
        return turned

    def _adding(self, name: str, norm: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            torch.add(self._hidden, self._outs[name], out=self._hidden)
            normed: torch.Tensor = norm(self._hidden).view(1, -1)
            return normed

        return run

    def _gated(self, activation: Any) -> torch.Tensor:
        gated: torch.Tensor = activation(self._outs["gate"]) * self._outs["up"]
        return gated.view(1, -1)

    def _piece(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return run if self._graphs is None else _Piece(run, self._graphs)

    def _row(self, count: int) -> torch.Tensor:
        return torch.zeros((1, 1, count), dtype=self._dtype, device=self._model.device)


class _Layer:
    """A layer's products by name, and its pieces."""

    def __init__(
        self, layer: Any, middle: Callable[[], torch.Tensor], end: Callable[[], torch.Tensor]
    ) -> None:
        self.attention, self.middle, self.end = layer.self_attn, middle, end
        self.linears = _linears(layer)
        self.shapes = {
            name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()
        }
        #: Of the memory that ``place`` writes to. Not to keep a cache that has gone.
        self.keys: Callable[[], torch.Tensor | None] = lambda: None
        self.place: Callable[[], torch.Tensor]


def _linears(layer: Any) -> dict[str, FedLinear]:
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj,
        "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
    }  # fmt: skip


class _Graphs:
    """What the graphs of one step share: the stream that they are captured on, and memory for what lies
    between their kernels and for their results. Any graph may overwrite what another left there: each
    result is read before the next graph begins, and what lasts longer is not in that memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()


class _Piece:
    """Small operations that come one after the other, as one launch. The first call runs them one by one,
    since a kernel cannot be loaded while a graph is captured; from the second on the result is always
    the same tensor."""

    def __init__(self, run: Callable[[], torch.Tensor], graphs: _Graphs) -> None:
        self._run, self._graphs = run, graphs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: torch.Tensor | None = None
        self._loaded = False

    def __call__(self) -> torch.Tensor:
        if not self._loaded:
            self._loaded = True
            return self._run()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _capture(self) -> torch.cuda.CUDAGraph:
        """As torch.cuda.graph does, but for collecting garbage and emptying caches: there are hundreds."""
        graph, graphs = torch.cuda.CUDAGraph(), self._graphs
        current = torch.cuda.current_stream()
        graphs.stream.wait_stream(current)
        with torch.cuda.stream(graphs.stream):
            # The keeper of the client may ask after events meanwhile: that is no part of this.
            graph.capture_begin(pool=graphs.pool, capture_error_mode="thread_local")
            try:
                self._result = self._run()
            except BaseException:  # memory that runs out is dealt with by others, who call again
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        del self._run  # and what it refers to
        current.wait_stream(graphs.stream)
        return graph
