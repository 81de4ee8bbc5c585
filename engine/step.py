"""One token through a model of `common.families` by fused kernels: a layer is four products, one attention.

Replaces transformers' forward for decoding with packed weights on CUDA: the same mathematics, with
activations in fp32 between the products. Weights are acquired as everywhere; what is not granted together,
or not packed, is multiplied one by one. While every weight stays (standing grants), the whole token is one
CUDA graph: no message, no allocation, one launch. A revoked grant drops the graph.

Several tokens that follow one another go side by side, each in a lane of its own: what a weight is needed
for is done for all of them while it is here, by the launches that they would get one after the other. So
their logits, keys and values are the same to the bit, the weights cross the link once, and what is paid
for each token is a reading from device memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import nn
from transformers import DynamicCache

from common.families import FAMILIES
from common.families.rope import ROPE_TYPES
from common.formats import PACKED
from common.repeated import Repeated
from engine.cache import PastLayer, head_dim, short_window
from engine.client import WeightClient
from engine.lane import MAX_CHUNKS, TILE_TOKENS, Lane, make_lane, room_for
from engine.ledger import Lease
from engine.linear import FedLinear
from engine.one_token import (
    GLU,
    PLAIN,
    RESIDUAL,
    attention_kernel,
    attention_warps,
    begin_kernel,
    combine_kernel,
    glu_kernel,
)
from engine.w4a16 import Epilogue, One, Scratch, dependent_launch, multiply_each, ring_parts

BEGIN_SIZE = 64


@dataclass
class _Layer:
    """What a layer's step needs beside its weights."""

    attention: list[FedLinear]  # q, k, v
    out: FedLinear
    gated: list[FedLinear]  # gate, up
    down: FedLinear
    bias: torch.Tensor | None  # of q, k and v, if they have one
    head_norms: tuple[torch.Tensor, torch.Tensor] | None  # of q and k, if they have any
    norm: torch.Tensor  # before attention
    norm_mlp: torch.Tensor


def supports(model: Any) -> str:
    """ "" if the model can be stepped through, else the reason why not."""
    if model.device.type != "cuda":
        return "it is not on a GPU"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"its dtype is {model.dtype}"
    return misfit(model)


def misfit(model: Any) -> str:
    """ "" if the step computes what the model's layers compute, on whatever device, else what differs."""
    config = model.config
    if not FAMILIES[config.model_type].stepped:
        return f"there is none for the family {config.model_type}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    dim = head_dim(config)
    window = short_window(config)
    checks = [
        (config.hidden_act == "silu", f"its activation is {config.hidden_act}"),
        (dim in (32, 64, 128, 256), f"its heads have {dim} elements"),
        # of which no table depends on the length
        (rope in ROPE_TYPES, f"its rotary embedding is {rope}"),
        (not window, window),
        (all(map(_biased_as_stepped, model.model.layers)), "it has biases beside q, k and v's"),
        (config.hidden_size % BEGIN_SIZE == 0, f"its hidden size is {config.hidden_size}"),
        (config.intermediate_size % BEGIN_SIZE == 0, f"its width is {config.intermediate_size}"),
    ]
    return next((reason for good, reason in checks if not good), "")


class Step:
    """The step of one model. One stream, one thread."""

    def __init__(self, model: Any, client: WeightClient) -> None:
        self._model, self._client = model, client
        config, device = model.config, model.device
        self._config, self._device, self._dtype = config, device, model.dtype
        self._dim = head_dim(config)
        self._heads, self._kv = config.num_attention_heads, config.num_key_value_heads
        self._layers = [_layer(layer) for layer in model.model.layers]
        self._linears = [
            linear
            for layer in self._layers
            for linear in (*layer.attention, layer.out, *layer.gated, layer.down)
        ]
        self._head = model.lm_head
        if isinstance(self._head, FedLinear):
            self._linears.append(self._head)
        self._pdl = dependent_launch(device)
        self._scratch = Scratch(device)
        self._lanes = [make_lane(config, device)]  # the first is the graph's
        self._sum_count = 0
        padded = max(16, triton.next_power_of_2(self._heads // self._kv))
        self._padded = padded
        self._partial = self._vector(self._kv * MAX_CHUNKS * padded * self._dim)
        self._peaks = self._vector(2 * self._kv * padded * MAX_CHUNKS)
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._held: dict[int, Lease] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_memory: tuple[torch.Tensor, torch.Tensor] | None = (
            None  # of the cache it writes
        )
        self._graph_grants: list[tuple[int, int, int]] = []  # that it reads
        self._tiles = 1  # of the graph
        self._loaded = False  # whether every kernel of a held token has run once
        self._reserve()

    @property
    def useful(self) -> bool:
        """Whether weights are packed now. With dequantized ones a token takes `engine.dense_step`, which
        multiplies with them to the last bit as the plain model does."""
        return self._client.packed

    @property
    def graphed(self) -> bool:
        """Whether the last token was one launch."""
        return bool(self._held)

    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits, fp32 [1, vocabulary], of the token that follows ``token`` [1, 1], whose keys and
        values are added to ``cache``. The result is overwritten by the next call."""
        length, layers = room_for(1, cache)
        self._token.copy_(token)
        lane = self._lanes[0]
        lane.begin(length)
        if lane.tiles != self._tiles:
            self._tiles, self._graph, self._loaded = lane.tiles, None, False
        self._prepare(layers)
        if not self._hold():
            self._run([lane], self._token, layers)
        else:
            self._client.used(len(self._linears))
            if self._loaded:
                self._replay(layers)
            else:  # a kernel cannot be compiled, nor loaded, while a graph is captured
                self._run([lane], self._token, layers)
                self._loaded = True
        for layer in layers:
            layer.set_length(length + 1)
        return lane.logits

    def several(self, tokens: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
        """The logits after each of ``tokens``, [1, up to MOST_LANES], which follow one another: what as many
        calls would give, to the bit, and what they would leave in ``cache``. The result is overwritten by
        the next call."""
        count = tokens.shape[1]
        length, layers = room_for(count, cache)
        while len(self._lanes) < count:
            self._lanes.append(make_lane(self._config, self._device))
        lanes = self._lanes[:count]
        for place, lane in enumerate(lanes):
            lane.begin(length + place)
        self._prepare(layers)
        if self._hold():
            self._client.used(len(self._linears))
        self._run(lanes, tokens, layers)
        for layer in layers:
            layer.set_length(length + count)
        return [lane.logits for lane in lanes]

    def rest(self) -> None:
        """No token is wanted for a while: give back what the graph holds."""
        held, self._held = list(self._held.values()), {}
        for lease in held:  # their last reader is queued: they go back when it is complete
            self._client.release(lease)

    # The graph ---------------------------------------------------------------------------------

    def _hold(self) -> bool:
        """Whether every weight is here to stay; if so, hold it. Takes what the feeder has said."""
        if self._held:
            if not self._client.recalled(self._held.values()):
                return True
            self.rest()
            return False
        leases = self._client.try_hold([linear.weight_index for linear in self._linears])
        if leases is None:
            return False
        if not _all_packed(leases):
            for lease in leases:
                self._client.release(lease)
            return False
        self._held = {lease.grant.weight: lease for lease in leases}
        grants = [(id(x.mapping), x.grant.offset_bytes, x.grant.generation) for x in leases]
        if grants != self._graph_grants:
            # Distances between weights are arguments, and large ones take another variant of a kernel.
            self._graph, self._loaded, self._graph_grants = None, False, grants
        return True

    def _replay(self, layers: Sequence[PastLayer]) -> None:
        memory = layers[0].memory  # all layers get theirs together
        if self._graph is None or memory is not self._graph_memory:
            graph = torch.cuda.CUDAGraph()
            # The keeper of the client may ask after events meanwhile: that is no part of this.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run(self._lanes[:1], self._token, layers)
            self._graph, self._graph_memory = graph, memory
        self._graph.replay()

    # The tokens --------------------------------------------------------------------------------

    def _run(self, lanes: list[Lane], tokens: torch.Tensor, layers: Sequence[PastLayer]) -> None:
        model = self._model.model
        embedded = model.embed_tokens(tokens)[0]
        for lane, x in zip(lanes, embedded, strict=True):
            self._begin(lane, x, self._layers[0].norm)
        for index, (layer, kept) in enumerate(zip(self._layers, layers, strict=True)):
            last = index + 1 == len(self._layers)
            after = model.norm.weight if last else self._layers[index + 1].norm
            self._multiply(layer.attention, lanes, layer.bias, [lane.qkv for lane in lanes])
            self._attend(layer, kept, lanes)
            self._add(layer.out, lanes, [lane.planes_out for lane in lanes], layer.norm_mlp)
            self._gate(layer.gated, lanes)
            self._add(layer.down, lanes, [lane.planes_inner for lane in lanes], after)
        if isinstance(self._head, FedLinear):
            self._multiply([self._head], lanes, None, [lane.logits.view(-1) for lane in lanes])
            return
        for lane in lanes:
            x = self._dense(lane.planes, lane.sums)
            lane.logits.copy_(nn.functional.linear(x, self._head.weight))

    def _multiply(
        self,
        linears: list[FedLinear],
        lanes: list[Lane],
        bias: torch.Tensor | None,
        ys: list[torch.Tensor],
        leases: list[Lease] | None = None,
    ) -> None:
        """y = W x + bias, where x is normed, for weights that share x, in one launch a lane if that can be.
        ``leases``: of all of them, if they are taken."""
        leases = leases or self._try(linears)
        if leases is not None and _all_packed(leases):
            with self._until_read(leases):
                multiply_each(self._plain(lanes, ys), _packed(linears, leases), bias, self._scratch)
            return
        first = 0
        with self._until_read(leases or ()):
            for number, linear in enumerate(linears):
                last = first + linear.out_features
                parts = [y[first:last] for y in ys]
                part_bias = None if bias is None else bias[first:last]
                first = last
                if leases:
                    self._multiply_by(linear, leases[number], lanes, part_bias, parts)
                    continue
                lease = self._client.acquire(linear.weight_index)
                with self._until_read([lease]):
                    self._multiply_by(linear, lease, lanes, part_bias, parts)

    def _multiply_by(
        self,
        linear: FedLinear,
        lease: Lease,
        lanes: list[Lane],
        bias: torch.Tensor | None,
        ys: list[torch.Tensor],
    ) -> None:
        if lease.grant.format == PACKED:
            packed = _packed([linear], [lease])
            multiply_each(self._plain(lanes, ys), packed, bias, self._scratch)
            return
        for lane, y in zip(lanes, ys, strict=True):
            y.copy_(linear.multiply(self._dense(lane.planes, lane.sums), lease).view(-1))

    def _plain(self, lanes: list[Lane], ys: list[torch.Tensor]) -> list[One]:
        eps, count = self._config.rms_norm_eps, self._sum_count
        return [
            One(lane.planes, y, Epilogue(int(PLAIN), lane.sums[:count], eps, pdl=self._pdl))
            for lane, y in zip(lanes, ys, strict=True)
        ]

    def _add(
        self, linear: FedLinear, lanes: list[Lane], xs: list[torch.Tensor], norm: torch.Tensor
    ) -> None:
        """hidden += W x, and the next x; ``xs``: of each lane, spread."""
        lease = self._lease(linear)
        with self._until_read([lease]):
            if lease.grant.format != PACKED:
                for lane, x in zip(lanes, xs, strict=True):
                    y = linear.multiply(self._dense(x), lease)
                    self._begin(lane, lane.hidden + y.view(-1), norm)
                return
            ones = [
                One(x, None, Epilogue(
                    int(RESIDUAL), hidden=lane.hidden, norm=norm, planes=lane.planes,
                    next_sums=lane.sums, pdl=self._pdl,
                ))
                for lane, x in zip(lanes, xs, strict=True)
            ]  # fmt: skip
            packed = _packed([linear], [lease])
            self._sum_count = multiply_each(ones, packed, None, self._scratch)

    def _gate(self, linears: list[FedLinear], lanes: list[Lane]) -> None:
        """silu(gate x) * (up x)."""
        leases = self._try(linears)
        if leases is None or not _all_packed(leases):
            self._multiply(linears, lanes, None, [lane.pair for lane in lanes], leases)
            for lane in lanes:
                gate, up = lane.pair.chunk(2)
                grid = (gate.numel() // BEGIN_SIZE,)
                glu_kernel[grid](
                    gate, up, lane.planes_inner, gate.numel(), SIZE=BEGIN_SIZE, num_warps=1
                )
            return
        eps, count = self._config.rms_norm_eps, self._sum_count
        ones = [
            One(lane.planes, None, Epilogue(
                int(GLU), lane.sums[:count], eps, planes=lane.planes_inner, pdl=self._pdl
            ))
            for lane in lanes
        ]  # fmt: skip
        with self._until_read(leases):
            multiply_each(ones, _packed(linears, leases), None, self._scratch)

    def _attend(self, layer: _Layer, past: PastLayer, lanes: list[Lane]) -> None:
        """Lane after lane, each of which sees the keys and values that those before it have written.

        The past is read before the kernel waits for the one before it. So only the first lane's kernel,
        whose past is that of former passes, may begin early; the others are launched to begin when all
        that came before has ended. What lanes share, ``partial`` and ``peaks``, is so free again, too.
        """
        assert past.memory is not None and self._tables is not None
        norms = layer.head_norms or (layer.norm, layer.norm)  # there must be something
        capacity = past.capacity
        shape = {
            "HEADS": self._heads, "GROUP": self._heads // self._kv, "PADDED": self._padded,
            "DIM": self._dim, "CHUNKS": MAX_CHUNKS, "KV": self._kv, "PDL": self._pdl,
            "num_warps": attention_warps(self._dim),
        }  # fmt: skip

        @cache
        def attend(tiles: int, early: bool) -> Repeated:
            chunks = min(MAX_CHUNKS, triton.cdiv(capacity, TILE_TOKENS * tiles))
            return Repeated(
                attention_kernel, (self._kv, chunks), TILE=TILE_TOKENS, TILES=tiles,
                HEAD_NORM=layer.head_norms is not None, launch_pdl=early, **shape,
            )  # fmt: skip

        @cache
        def combine(tiles: int) -> Repeated:
            chunk = TILE_TOKENS * tiles
            return Repeated(
                combine_kernel, (self._heads,), CHUNK=chunk, launch_pdl=self._pdl, **shape
            )

        for lane in lanes:
            attend(lane.tiles, self._pdl and lane is lanes[0])(
                lane.qkv, *norms, self._config.rms_norm_eps, *self._tables, *past.memory,
                lane.position, self._partial, self._peaks, capacity, self._dim**-0.5,
            )  # fmt: skip
            combine(lane.tiles)(self._partial, self._peaks, lane.position, lane.planes_out)

    def _begin(self, lane: Lane, x: torch.Tensor, norm: torch.Tensor) -> None:
        count = x.numel() // BEGIN_SIZE
        begin_kernel[(count,)](
            x, norm, lane.hidden, lane.planes, lane.sums, x.numel(), SIZE=BEGIN_SIZE, num_warps=1
        )
        self._sum_count = count

    def _dense(self, planes: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [1, K] in the model's dtype, gathered from its planes; normed, if ``sums`` are given."""
        low, high = planes[:4], planes[4:8]
        x = torch.cat([low + high / (1 << 16), high]).t().reshape(1, -1)
        if sums is not None:
            mean = sums[: self._sum_count].sum() / x.numel()
            x = x * torch.rsqrt(mean + self._config.rms_norm_eps)
        return x.to(self._dtype)

    # Leases ------------------------------------------------------------------------------------

    def _try(self, linears: list[FedLinear]) -> list[Lease] | None:
        """The leases of all, if all are granted now."""
        if self._held:
            return [self._held[linear.weight_index] for linear in linears]
        return self._client.try_acquire([linear.weight_index for linear in linears])

    def _lease(self, linear: FedLinear) -> Lease:
        if self._held:
            return self._held[linear.weight_index]
        return self._client.acquire(linear.weight_index)

    @contextmanager
    def _until_read(self, leases: Sequence[Lease]) -> Iterator[None]:
        """What is queued in here is the last that reads these leases, unless they are held."""
        try:
            yield
        finally:
            if not self._held:
                for lease in leases:
                    self._client.release(lease)

    # Memory ------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Scratch for every product, together or one by one: it must not be allocated in a graph."""
        groups = [[self._head]] if isinstance(self._head, FedLinear) else []
        for layer in self._layers[:1]:
            groups += [layer.attention, [layer.out], layer.gated, [layer.down]]
        for group in groups:
            rows = sum(linear.out_features for linear in group)
            self._scratch.hold(ring_parts(group[0].in_features) * rows, rows)

    def _vector(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float32, device=self._device)

    def _prepare(self, layers: Sequence[PastLayer]) -> None:
        """Rotary tables for every position that the cache has room for."""
        capacity = layers[0].capacity
        if self._tables is not None and self._tables[0].shape[0] >= capacity:
            return
        positions = torch.arange(capacity, device=self._device)[None]
        sample = torch.empty(0, dtype=self._dtype, device=self._device)
        cosines, sines = self._model.model.rotary_emb(sample, positions)
        self._tables = (cosines[0].contiguous(), sines[0].contiguous())
        self._graph = None


def _biased_as_stepped(layer: Any) -> bool:
    """Whether q, k and v have biases all or none, and nothing else has."""
    attention, mlp = layer.self_attn, layer.mlp
    others = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    first = attention.q_proj.bias is None
    return all(linear.bias is None for linear in others) and all(
        (linear.bias is None) == first for linear in (attention.k_proj, attention.v_proj)
    )


def _layer(layer: Any) -> _Layer:
    attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    biases = [linear.bias for linear in attention]
    bias = None if any(b is None for b in biases) else torch.cat([b.data for b in biases])
    q_norm = getattr(layer.self_attn, "q_norm", None)
    return _Layer(
        attention=attention,
        out=layer.self_attn.o_proj,
        gated=[layer.mlp.gate_proj, layer.mlp.up_proj],
        down=layer.mlp.down_proj,
        bias=bias,
        head_norms=None if q_norm is None else (q_norm.weight, layer.self_attn.k_norm.weight),
        norm=layer.input_layernorm.weight,
        norm_mlp=layer.post_attention_layernorm.weight,
    )


def _all_packed(leases: Sequence[Lease]) -> bool:
    return all(lease.grant.format == PACKED for lease in leases)


def _packed(linears: Sequence[FedLinear], leases: Sequence[Lease]) -> list[Any]:
    return [
        lease.packed((linear.out_features, linear.in_features))
        for linear, lease in zip(linears, leases, strict=True)
    ]
