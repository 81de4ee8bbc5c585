"""The tokenizer that a GGUF file carries, as tokenizer files: transformers does the work."""

from __future__ import annotations

from pathlib import Path

from common.checkpoint import companion_files
from common.log import log
from feeder.checkpoints.gguf_file import one_line


def save_tokenizer(file: Path, scratch: Path) -> list[Path]:
    """Write the tokenizer of `file` into the directory `scratch`; returns the files, none if it cannot be.

    That it cannot is said in one line, and is no error: a store without a tokenizer takes token ids.
    """
    from transformers import AutoTokenizer

    alone = scratch / "gguf"  # what lies beside the file is none of transformers' business
    alone.mkdir()
    (alone / "model.gguf").symlink_to(file.absolute())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            alone, gguf_file="model.gguf", local_files_only=True
        )
        tokenizer.save_pretrained(scratch)
    except Exception as error:  # whatever a file makes that library raise
        log.warning(
            "%s: transformers cannot make a tokenizer of it (%s: %s): prompts have to be token ids; or"
            " put the file into a directory of its own with the model's tokenizer.json, and name that",
            file.name, type(error).__name__, one_line(error),
        )  # fmt: skip
        return []
    return companion_files(scratch)
