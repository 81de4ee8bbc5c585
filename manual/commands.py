"""All commands and their parsers, in the order in which a reader meets them. Builds parsers, runs none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from common.parser import Parser


@dataclass(frozen=True)
class Command:
    """``word``: what comes after ``launch.py``, "" for none, None for what it does not start."""

    title: str
    word: str | None
    parser: Parser


def commands() -> Iterator[Command]:
    """Imports each command's module, none of which imports torch for its parser."""
    import feeder.__main__
    import feeder.control
    import feeder.doctor.__main__
    import feeder.quantize
    import feeder.simulate
    import launch

    for word in ("", "serve", "chat"):
        yield Command(f"launch.py {word}".rstrip(), word, launch.make_parser(word)[0])
    yield Command("launch.py doctor", "doctor", feeder.doctor.__main__.make_parser())
    yield Command("feeder.quantize", "quantize", feeder.quantize.make_parser())
    for word in ("status", "swap", "stop"):
        yield Command(f"feeder {word}", word, feeder.control.make_parser(word))
    yield Command("feeder simulate", "simulate", feeder.simulate.make_parser())
    yield from _by_hand()


def _by_hand() -> Iterator[Command]:
    """What the launcher starts, and what is not in a wheel."""
    import engine.__main__
    import feeder.__main__
    from manual import completion

    yield Command("feeder", None, feeder.__main__.make_parser())
    for word in ("", "serve", "chat"):
        yield Command(f"engine {word}".rstrip(), None, engine.__main__.make_parser(word))
    yield Command("completion", "completion", completion.make_parser())
    try:
        import bench.__main__
    except ModuleNotFoundError:
        return
    yield Command("bench", None, bench.__main__.parser())
