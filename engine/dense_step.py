"""One token through a model whose slots are dequantized: transformers' operations, without its modules.

Between its products a layer does some thirty small operations, and to launch each takes the host longer
than the device needs to do it. So every run of them is captured, once, as a small CUDA graph. Products are
called one by one, since each weight lies elsewhere the next time, and so is attention, whose past grows.
All are the very calls, on operands of the same shapes, that the layers would make, so logits are
transformers' own to the last bit. On the CPU the same runs without graphs.

Several tokens that follow one another go side by side, each in a lane of its own, by the very calls that
they would get one after the other, so that a weight is acquired once for all of them. Their small
operations are not captured: graphs write to fixed memory, and there would be hundreds for each lane.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.families import FAMILIES
from common.formats import PACKED
from engine.cache import PastLayer, short_window
from engine.client import WeightClient
from engine.lane import room_for
from engine.ledger import Lease
from engine.linear import FedLinear

Memory = tuple[torch.Tensor, torch.Tensor]
Run = Callable[["_Lane"], torch.Tensor]


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
        self._lanes = [_Lane(model)]  # the first is the graphs'
        norms = [layer.input_layernorm for layer in layers] + [model.model.norm]
        self._begin = self._piece(lambda lane: norms[0](lane.hidden).view(1, -1))
        self._gate = self._piece(_gated(layers[0].mlp.act_fn))
        self._layers = [
            _Layer(
                layer,
                self._piece(_adding("o", layer.post_attention_layernorm)),
                self._piece(_adding("down", after)),
            )
            for layer, after in zip(layers, norms[1:], strict=True)
        ]

    @property
    def useful(self) -> bool:
        """Whether all slots are dequantized now. Products of packed ones are better made together."""
        return not self._client.packed

    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits [1, vocabulary] of the token that follows ``token`` [1, 1], whose keys and values
        are added to ``cache``, which is to have room for them."""
        return self.several(token, cache)[0]

    @torch.no_grad()
    def several(self, tokens: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
        """The logits after each of ``tokens``, [1, up to MOST_LANES], which follow one another: what as many
        calls would give, to the bit, and what they would leave in ``cache``."""
        count = tokens.shape[1]
        length, kept = room_for(count, cache)
        while len(self._lanes) < count:
            self._lanes.append(_Lane(self._model))
        lanes = self._lanes[:count]
        for place, lane in enumerate(lanes):
            lane.begin(self._model.model, tokens[:, place : place + 1], length + place)
        xs = self._each(self._begin, lanes)
        for layer, memory in zip(self._layers, kept, strict=True):
            xs = self._run(layer, memory, lanes, xs, length)
        logits = self._logits([x.view(1, 1, -1) for x in xs])
        for memory in kept:
            memory.set_length(length + count)
        return logits

    def _logits(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        head = self._model.lm_head
        if not isinstance(head, FedLinear):
            return [head(x)[:, -1] for x in xs]
        with self._leased(head) as lease:
            return [head.multiply(x, lease)[:, -1] for x in xs]

    def _run(
        self,
        layer: _Layer,
        kept: PastLayer,
        lanes: list[_Lane],
        xs: list[torch.Tensor],
        length: int,
    ) -> list[torch.Tensor]:
        for name in ("q", "k", "v"):
            self._product(layer, name, lanes, xs)
        found = [
            self._attend(layer, kept, lane, length + place, len(lanes) == 1)
            for place, lane in enumerate(lanes)
        ]
        self._product(layer, "o", lanes, found)
        xs = self._each(layer.middle, lanes)
        self._product(layer, "gate", lanes, xs)
        self._product(layer, "up", lanes, xs)
        self._product(layer, "down", lanes, self._each(self._gate, lanes))
        return self._each(layer.end, lanes)

    def _attend(
        self, layer: _Layer, kept: PastLayer, lane: _Lane, position: int, alone: bool
    ) -> torch.Tensor:
        module, memory = layer.attention, kept.memory
        assert memory is not None
        if not alone:
            query = self._placed(lane, module, memory)
        else:
            if layer.keys() is not memory[0]:  # the cache is another, or has grown
                layer.keys = weakref.ref(memory[0])
                layer.place = self._piece(self._placing(module, kept))
            query = layer.place(lane)
        keys, values = (part[:, :, : position + 1] for part in memory)
        found, _ = self._attention(
            module, query, keys, values, None, dropout=0.0, scaling=module.scaling
        )
        return found.reshape(1, -1)

    def _product(
        self, layer: _Layer, name: str, lanes: list[_Lane], xs: list[torch.Tensor]
    ) -> None:
        """What nn.Linear computes, into memory of its own, so that graphs find it there."""
        linear = layer.linears[name]
        with self._leased(linear) as lease:
            if lease.grant.format == PACKED:  # the slots have just been swapped
                for lane, x in zip(lanes, xs, strict=True):
                    lane.flat[name].copy_(linear.multiply(x, lease))
                return
            weight = lease.weight(self._dtype, layer.shapes[name]).t()
            for lane, x in zip(lanes, xs, strict=True):
                if linear.bias is None:
                    torch.mm(x, weight, out=lane.flat[name])
                else:
                    torch.addmm(linear.bias, x, weight, out=lane.flat[name])

    @contextmanager
    def _leased(self, linear: FedLinear) -> Iterator[Lease]:
        lease = self._client.acquire(linear.weight_index)
        try:
            yield lease
        finally:
            self._client.release(lease)

    # Pieces: what is captured. They read and write memory that stays where it is. -----------------

    def _placed(self, lane: _Lane, attention: Any, memory: Memory) -> torch.Tensor:
        """Turn q and k by the position's angles, after their norms if there are any; k and v go where the
        past is kept. q is the result."""
        q, k, v = (lane.outs[name].view(1, 1, -1, attention.head_dim) for name in ("q", "k", "v"))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        q, k = self._rotate(q, k, *lane.angles)
        for part, states in zip(memory, (k, v), strict=True):
            part.index_copy_(2, lane.position, states)
        turned: torch.Tensor = q
        return turned

    def _placing(self, attention: Any, kept: PastLayer) -> Run:
        weak = weakref.ref(kept)  # not to keep a cache that has gone

        def run(lane: _Lane) -> torch.Tensor:
            kept = weak()
            assert kept is not None and kept.memory is not None
            return self._placed(lane, attention, kept.memory)

        return run

    def _piece(self, run: Run) -> Run:
        return run if self._graphs is None else _Piece(run, self._graphs)

    def _each(self, piece: Run, lanes: list[_Lane]) -> list[torch.Tensor]:
        """What it gives for each lane: for one alone by its graph, if it has one."""
        if len(lanes) > 1 and isinstance(piece, _Piece):
            piece = piece.run
        return [piece(lane) for lane in lanes]


def _adding(name: str, norm: Any) -> Run:
    def run(lane: _Lane) -> torch.Tensor:
        torch.add(lane.hidden, lane.outs[name], out=lane.hidden)
        normed: torch.Tensor = norm(lane.hidden).view(1, -1)
        return normed

    return run


def _gated(activation: Any) -> Run:
    def run(lane: _Lane) -> torch.Tensor:
        gated: torch.Tensor = activation(lane.outs["gate"]) * lane.outs["up"]
        return gated.view(1, -1)

    return run


class _Lane:
    """What one token of a pass owns. Where products go is of every layer alike: each is read before the next
    layer's is made."""

    def __init__(self, model: Any) -> None:
        def row(count: int) -> torch.Tensor:
            return torch.zeros((1, 1, count), dtype=model.dtype, device=model.device)

        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.angles: tuple[torch.Tensor, ...] = ()  # cosines and sines of the position
        self.hidden = row(model.config.hidden_size)
        linears = _linears(model.model.layers[0])
        self.outs = {name: row(linear.out_features) for name, linear in linears.items()}
        self.flat = {name: out.view(1, -1) for name, out in self.outs.items()}

    def begin(self, model: Any, token: torch.Tensor, position: int) -> None:
        """What all layers read: the token's embedding, its position, and the angles of that."""
        self.hidden.copy_(model.embed_tokens(token))
        self.position.fill_(position)
        angles = model.rotary_emb(self.hidden, self.position[None])
        if not self.angles:
            self.angles = tuple(map(torch.empty_like, angles))
        for mine, new in zip(self.angles, angles, strict=True):
            mine.copy_(new)


class _Layer:
    """A layer's products by name, and its pieces."""

    def __init__(self, layer: Any, middle: Run, end: Run) -> None:
        self.attention, self.middle, self.end = layer.self_attn, middle, end
        self.linears = _linears(layer)
        self.shapes = {
            name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()
        }
        #: Of the memory that ``place`` writes to. Not to keep a cache that has gone.
        self.keys: Callable[[], torch.Tensor | None] = lambda: None
        self.place: Run


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

    def __init__(self, run: Run, graphs: _Graphs) -> None:
        self.run, self._graphs = run, graphs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: torch.Tensor | None = None
        self._loaded = False

    def __call__(self, lane: _Lane) -> torch.Tensor:
        """Of the one lane that has graphs."""
        if not self._loaded:
            self._loaded = True
            return self.run(lane)
        if self._graph is None:
            self._graph = self._capture(lane)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _capture(self, lane: _Lane) -> torch.cuda.CUDAGraph:
        """As torch.cuda.graph does, but for collecting garbage and emptying caches: there are hundreds."""
        graph, graphs = torch.cuda.CUDAGraph(), self._graphs
        current = torch.cuda.current_stream()
        graphs.stream.wait_stream(current)
        with torch.cuda.stream(graphs.stream):
            # The keeper of the client may ask after events meanwhile: that is no part of this.
            graph.capture_begin(pool=graphs.pool, capture_error_mode="thread_local")
            try:
                self._result = self.run(lane)
            except BaseException:  # memory that runs out is dealt with by others, who call again
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(graphs.stream)
        return graph
