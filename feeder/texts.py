"""Text to calibrate by and to measure on: from a file, or a sample that comes with Python. As tokens.

Owns the reading, the sample and the cutting into contexts. Knows nothing of models but their tokenizer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint import VOCABULARIES
from common.errors import UsageError
from common.families import windows
from common.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    import torch

MAX_BYTES = 64 << 20
SAMPLE = "Python's help topics"
_MEASURED_ONE_IN = 4  # of the sample's texts; the others are to calibrate by
_RECORDS = (".json", ".jsonl")


@dataclass(frozen=True)
class Rows:
    """Tokens [rows, length], padded with 0 at the end, and how many of each row are text."""

    ids: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Text:
    """Documents, each of which is a text of its own, and what to call them."""

    name: str
    documents: tuple[str | Prompt, ...]

    @property
    def checksum(self) -> str:
        """Of all that is in it, as 32 hexadecimal digits."""
        from common.checksum import checksum

        return checksum("\0".join(map(str, self.documents)).encode())


def read(path: Path, paragraphs: bool = False) -> Text:
    """The text of a file: JSON lines as --prompts takes them if it is named .jsonl or .json, else plain
    UTF-8, of which each paragraph is a document of its own if that is asked for. UsageError."""
    if path.suffix.lower() in _RECORDS:
        return Text(path.name, tuple(read_prompts(path)))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"text {path} is larger than {MAX_BYTES >> 20} MiB: give a part of it")
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"text {path} is not UTF-8 ({error}): give a file of UTF-8 text"
        ) from error
    except OSError as error:
        raise UsageError(f"text {path} cannot be read: {error.strerror}") from error
    parts = re.split(r"\n\s*\n", text.strip()) if paragraphs else [text]
    return Text(path.name, tuple(parts))


def sample(measured: bool) -> Text:
    """Python's own help on its language: the part to measure on, or the one to calibrate by."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "this Python comes without its help topics: give a file of text"
        ) from error
    sides: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()  # topics quote each other
    for take in (True, False):  # to measure on first, so that nothing of it is calibrated by
        for number, name in enumerate(sorted(topics)):
            if (number % _MEASURED_ONE_IN == 0) == take:
                for paragraph in re.split(r"\n\s*\n", topics[name]):
                    if paragraph.strip() not in seen:
                        seen.add(paragraph.strip())
                        sides[take].append(paragraph)
    return Text(SAMPLE, ("\n\n".join(sides[measured]),))


@dataclass(frozen=True)
class Excerpt:
    """A text, and how much of it: ``tokens`` in contexts of ``length`` tokens at most."""

    path: Path | None  # None: the sample
    tokens: int
    length: int
    measured: bool  # which part of the sample
    paragraphs: bool = False

    def text(self) -> Text:
        """UsageError if the file is no text."""
        return sample(self.measured) if self.path is None else read(self.path, self.paragraphs)

    def rows(self, home: Path, config: Mapping[str, Any]) -> Rows:
        """As tokens of the tokenizer in ``home``, for the model that ``config`` describes. UsageError if
        there are none."""
        return tokenize(self.text(), load_tokenizer(home), config, self)


#: Of the length that models are commonly calibrated by; a quarter of the usual number of tokens, which
#: made no difference to the models in docs/quality.md.
CALIBRATION = Excerpt(None, 1 << 16, 2048, measured=False)
MEASUREMENT = Excerpt(None, 1 << 14, 512, measured=True)


def tokenizer_home(files: Sequence[Path], model_dir: Path) -> Path:
    """Where the tokenizer among a checkpoint's ``files`` lies; ``model_dir`` if there is none."""
    return next((file.parent for file in files if file.name in VOCABULARIES), model_dir)


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer in a checkpoint. UsageError if there is none."""
    from transformers import AutoTokenizer

    if not any((model_dir / name).is_file() for name in VOCABULARIES):
        # transformers would make an empty tokenizer of nothing
        where = "beside it, and name the directory" if model_dir.is_file() else "there"
        raise UsageError(f"{model_dir} has no tokenizer: put its tokenizer.json {where}")
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # of several libraries, for a file that is no tokenizer
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{model_dir} has no tokenizer that can be read: {reason}") from error


def tokenize(text: Text, tokenizer: Any, config: Mapping[str, Any], excerpt: Excerpt) -> Rows:
    """The contexts of ``excerpt``, evenly over the whole text. UsageError if nothing in them can be
    predicted, or the tokenizer is of another model."""
    import torch

    if excerpt.tokens < 2 or excerpt.length < 2:
        raise UsageError(
            f"{excerpt.tokens} tokens of a text in contexts of {excerpt.length}: expected at least 2 of each"
        )
    length = min(excerpt.length, longest(config))
    rows: list[list[int]] = []
    for document in text.documents:
        ids = tokenizer(_as_text(document, tokenizer), add_special_tokens=False, verbose=False)
        found = ids["input_ids"]
        rows += [found[at : at + length] for at in range(0, len(found), length)]
    rows = _evenly(
        [row for row in rows if len(row) > 1], excerpt.tokens
    )  # a first token is not predicted
    if not rows:
        raise UsageError(f"{text.name} has fewer than two tokens: give a longer text")
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    if int(padded.max()) >= config["vocab_size"]:
        raise UsageError(
            f"the tokenizer makes token {int(padded.max())} of {text.name}, the model has"
            f" {config['vocab_size']}: is it another model's?"
        )
    return Rows(padded, tuple(len(row) for row in rows))


def longest(config: Mapping[str, Any]) -> int:
    """The longest context that a model sees whole: without the limit of a sliding window."""
    limits = [config.get("max_position_embeddings"), *windows(dict(config))]
    return min((limit for limit in limits if limit is not None), default=sys.maxsize)


def _evenly(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Rows at even distances that have ``tokens`` tokens together, the last of them cut."""
    share = min(1.0, tokens / max(1, sum(map(len, rows))))
    count = min(len(rows), -int(-len(rows) * share // 1))
    chosen: list[list[int]] = []
    for number in range(count):
        row = rows[number * len(rows) // count][:tokens]
        tokens -= len(row)
        if len(row) > 1:
            chosen.append(row)
    return chosen


def _as_text(document: str | Prompt, tokenizer: Any) -> str:
    """A prompt goes through the chat template, if there is one, as the engine does it."""
    if isinstance(document, str):
        return document
    answer = document.expected or ""
    if not tokenizer.chat_template:
        return f"{document.text}\n{answer}"
    messages = [{"role": "user", "content": document.text}]
    if answer:
        messages.append({"role": "assistant", "content": answer})
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answer
        )
    except Exception as error:  # a template is the model's, and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the chat template refuses {document.text!r:.40}: {reason}") from error
