"""The tokenizer that a GGUF file carries, as tokenizer files: transformers does the work.

Owns how text is split before byte-level merges, which a GGUF file says by a name only: not every version of
transformers knows each, and with another split the same text becomes other tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint import companion_files
from common.store_index import CONFIG_FILE
from feeder.checkpoints.gguf_file import GgufFile, one_line

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_MODEL = "tokenizer.ggml.model"
_BYTE_LEVEL = "gpt2"  # what that says of byte-level merges, whoever's
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_QWEN2 = rf"{_SUFFIXES}|{_WORD}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*|{_END}"
_LLAMA3 = rf"{_SUFFIXES}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_END}"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}[\r\n/]*|{_END}"
#: By what `tokenizer.ggml.pre` says. docs/checkpoints.md names them.
_SPLITS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}
# Each of the splits cuts this otherwise.
_SAMPLE = "It's HERE'S 1234567 aBc Naïve  don't\n\n x\t -/\n/= 2.5 "


def save_tokenizer(file: GgufFile, scratch: Path) -> list[Path]:
    """Write the tokenizer of `file` into the directory `scratch`; returns the files.

    Raises ValueError, which says why, if there is none or it cannot be made.
    """
    if file.key(_MODEL) is None:
        raise ValueError("it has no tokenizer")
    alone = scratch / "gguf"  # what lies beside the file is none of transformers' business
    alone.mkdir()
    (alone / "model.gguf").symlink_to(file.path.absolute())
    try:
        _convert(file, alone, scratch)
    except Exception as error:  # whatever a file makes that library raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"transformers cannot make a tokenizer of it ({reason})") from error
    return companion_files(scratch)


def _convert(file: GgufFile, alone: Path, scratch: Path) -> None:
    """Raises ValueError if text would be split otherwise than the file says, and what transformers raises."""
    from transformers import AutoTokenizer

    split = None
    if file.key(_MODEL) == _BYTE_LEVEL:
        split = _splitter(file.key("tokenizer.ggml.pre"))
    tokenizer: Any = AutoTokenizer.from_pretrained(
        alone, gguf_file="model.gguf", local_files_only=True
    )
    for name in ("bos", "eos"):  # not every version takes them from the file
        index = file.key(f"tokenizer.ggml.{name}_token_id")
        token = None if index is None else tokenizer.convert_ids_to_tokens(index)
        setattr(tokenizer, f"{name}_token", token)
    if split is None:
        tokenizer.save_pretrained(scratch)
        return
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.save_pretrained(scratch)
    # A tokenizer class of the model's family may split by itself, whatever the files say.
    (scratch / CONFIG_FILE).write_text(json.dumps({"model_type": file.key("general.architecture")}))
    loaded: Any = AutoTokenizer.from_pretrained(scratch, local_files_only=True)
    if _pieces(loaded.backend_tokenizer.pre_tokenizer) != _pieces(split):
        raise ValueError(
            f"tokenizer.ggml.pre is {file.key('tokenizer.ggml.pre')!r:.40}, and "
            f"{type(loaded).__name__} splits text otherwise"
        )


def _splitter(name: Any) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if not isinstance(name, str) or name not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r:.40}, expected one of {', '.join(_SPLITS)}"
        )
    split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, rest])


def _pieces(split: PreTokenizer) -> list[str]:
    return [piece for piece, _ in split.pre_tokenize_str(_SAMPLE)]
