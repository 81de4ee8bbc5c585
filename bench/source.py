"""The store that is measured: one that is given, a random one of a known shape, or the demo's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bench.record import ROOT
from bench.settings import SHAPE_HELP
from common.arguments import Parser
from common.errors import UsageError
from common.log import log
from common.shapes import SHAPES
from common.store import Store

DEFAULT_SHAPE = "qwen2.5-32b"
DEMO_SHAPE = "demo"  # no random weights: a model whose answers can be checked
_DEMO = ROOT / "demo" / "model"


def add_streamed(parser: Parser) -> None:
    """The flags that name a store, and how it is streamed."""
    parser.add_argument("--store", metavar="STORE", help="measure this store")
    parser.add_argument("--shape", metavar="SHAPE", help=SHAPE_HELP)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    parser.add_argument("--cache", default="16", metavar="N|SIZE")
    parser.add_argument("--strategy", default="ring", help="ring streams everything")
    parser.add_argument("--slots", default="packed", choices=("packed", "dequantized"))


class Source:
    """Opens the store when it is first asked for; ``with`` removes what was made for it."""

    def __init__(self, store: str | None, shape: str | None, large: bool) -> None:
        """``large``: whether it is a 32B's shape if neither is named, else the demo's.

        UsageError if the flags contradict each other or name what there is not."""
        if store and shape:
            raise UsageError("--store and --shape: give one of them")
        if shape and shape not in (*SHAPES, DEMO_SHAPE):
            known = ", ".join((*SHAPES, DEMO_SHAPE))
            raise UsageError(f"shape {shape!r} is not known: name one of {known}")
        self._path = store
        chosen = shape or (DEFAULT_SHAPE if large else DEMO_SHAPE)
        self._shape = None if chosen == DEMO_SHAPE else chosen
        self._made: str | None = None
        self._store: Store | None = None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)

    @property
    def name(self) -> str:
        """For people: the shape, the store's directory, or demo."""
        return Path(self._path).resolve().name if self._path else self._shape or "demo"

    @property
    def small(self) -> bool:
        """Whether it is the demo's, for which a short sweep is enough."""
        return not self._path and not self._shape

    def store(self) -> Store:
        if self._store is None:
            self._store = Store.open(Path(self._path).resolve()) if self._path else self._make()
        return self._store

    def _make(self) -> Store:
        self._made = tempfile.mkdtemp(prefix="weight-feeder-bench-")
        path = Path(self._made) / "store"
        if self._shape:
            from feeder.random_store import make_random_store

            log.info("making a random store in the shape of %s in %s", self._shape, path)
            return make_random_store(SHAPES[self._shape], path)
        from feeder.quantize import quantize_checkpoint

        quantize_checkpoint(_DEMO, path, "cpu", progress=False)
        return Store.open(path)
