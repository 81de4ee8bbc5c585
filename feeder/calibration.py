"""Quantize a model by what runs through it: layer by layer, on the outputs of the layers before, as
they are once quantized.

Owns the walk and the sums of x xᵀ of every Linear's inputs. `feeder.gptq` owns the arithmetic,
`feeder.layerwise` the layers. Hidden states are in host memory; the device holds one layer, the
Hessians of its inputs, and what quantizing a weight takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from common import int4
from common.checkpoint import EMBEDDING, HEAD
from common.errors import CheckpointError, MemoryShortageError
from common.families import is_tied
from common.log import log
from common.store_index import RESIDENT_DTYPES
from feeder.checkpoints.source import Source
from feeder.gptq import Curvature, gptq
from feeder.layerwise import Decoder, of_source
from feeder.search import weighted
from feeder.texts import Rows

Packed = tuple[str, torch.Tensor, torch.Tensor]  # a weight's name, codes and scales
_INPUTS_AT_ONCE = 1 << 12  # into a Hessian


def calibrated(
    source: Source, rows: Rows, device: torch.device, poll: Callable[[], None]
) -> Iterator[Packed]:
    """Every weight of the model by the method "gptq", on the CPU, in the order of use.

    ``rows``: the text to calibrate by. ``poll`` is called often; what it raises goes through.
    Raises CheckpointError or MemoryShortageError.
    """
    try:
        yield from _Calibration(source, rows, device, poll).weights()
    except torch.OutOfMemoryError as error:
        raise MemoryShortageError(
            "the GPU has no room for a layer and the Hessians of its inputs: use --device cpu,"
            " or a method that needs no data"
        ) from error


class _Calibration:
    def __init__(
        self, source: Source, rows: Rows, device: torch.device, poll: Callable[[], None]
    ) -> None:
        kept = {part.name: RESIDENT_DTYPES[part.dtype] for part in source.parts()}
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in kept.items()}
        # The model's own on a GPU: products in fp32 are slow there.
        dtype = self._dtypes[EMBEDDING] if device.type == "cuda" else torch.float32
        self._source, self._device, self._poll = source, device, poll
        self._model = of_source(source, device, dtype)
        self._decoder = Decoder(source.config, device, poll)
        places = torch.arange(rows.ids.shape[1])
        self._is_text = places < torch.tensor(rows.lengths)[:, None]  # [rows, length]
        self._states = self._decoder.embed(rows.ids, self._model)

    @torch.inference_mode()
    def weights(self) -> Iterator[Packed]:
        for index in range(self._decoder.count):
            layer = self._decoder.layer(index, self._model)
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
            for names in self._sharing(layer, linears):
                curvature = self._curvature(layer, linears[names[0]])
                for name in names:
                    yield self._replace(f"model.layers.{index}.{name}", linears[name], curvature)
            for part in self._decoder.batches(self._states):
                self._states[part] = self._decoder.forward(layer, self._states[part])
            self._decoder.leave(index)
        if not is_tied(self._source.config):
            yield self._head()

    def _sharing(self, layer: nn.Module, linears: Mapping[str, nn.Linear]) -> list[list[str]]:
        """The layer's Linears in the order of use, those with the same input together."""
        calls: list[tuple[torch.Tensor, list[str]]] = []

        def note(name: str, x: torch.Tensor) -> None:
            for earlier, names in calls:
                if earlier is x:
                    names.append(name)
                    return
            calls.append((x, [name]))  # the tensor is kept, so that no other is taken for it

        hooks = [
            linear.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
            for name, linear in linears.items()
        ]
        self._decoder.forward(layer, self._states[:1])
        for hook in hooks:
            hook.remove()
        return [names for _, names in calls]

    def _curvature(self, layer: nn.Module, linear: nn.Linear) -> Curvature | None:
        """Of what goes into ``linear``, when the whole text runs through the layer."""
        found = _Hessian(linear.in_features, self._device)

        def see(_: nn.Module, given: tuple[torch.Tensor]) -> None:
            found.add(given[0], is_text)
            raise _Enough  # what comes behind it need not run

        hook = linear.register_forward_pre_hook(see)
        for part in self._decoder.batches(self._states):
            is_text = self._is_text[part].to(self._device)
            with contextlib.suppress(_Enough):
                self._decoder.forward(layer, self._states[part])
        hook.remove()
        return found.curvature()

    def _replace(self, name: str, linear: nn.Linear, curvature: Curvature | None) -> Packed:
        """Quantize a Linear's weight, and let it go on with what is left of it."""
        codes, scales = self._quantize(name, linear.weight, curvature)
        shape, dtype = linear.weight.shape, linear.weight.dtype
        linear.weight.data = int4.dequantize(
            codes.to(self._device), scales.to(self._device), shape, dtype
        )
        return name, codes, scales

    def _quantize(
        self, name: str, weight: torch.Tensor, curvature: Curvature | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            if curvature is not None:
                return gptq(weight, curvature, self._poll)
            log.warning("%s: its inputs are nothing to calibrate by; weighted is taken", name)
            codes, scales = int4.quantize(weight, weighted)
            return codes.cpu(), scales.cpu()
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def _head(self) -> Packed:
        norm, found = (
            self._decoder.norm(self._model),
            _Hessian(self._states.shape[-1], self._device),
        )
        for part in self._decoder.batches(self._states):
            normed = norm(self._states[part].to(self._device))
            found.add(normed, self._is_text[part].to(self._device))
        # In host memory: it is the largest weight, and comes to the device in parts.
        weight = of_source(self._source, torch.device("cpu"), self._dtypes[HEAD])(HEAD)
        return "lm_head", *self._quantize("lm_head", weight, found.curvature())


class _Enough(Exception):
    """A forward pass has come as far as it was wanted to."""


class _Hessian:
    """The sum of x xᵀ over inputs x."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)

    def add(self, x: torch.Tensor, is_text: torch.Tensor) -> None:
        """Inputs [rows, length, K] and which of them count, bool [rows, length]."""
        for inputs in x[is_text].split(_INPUTS_AT_ONCE):
            part = inputs.float()
            self._sum.addmm_(part.T, part)

    def curvature(self) -> Curvature | None:
        """What the sum means, which is used up."""
        return Curvature.of(self._sum)
