"""Whether two models speak of the same tokens, so that one may propose what the other checks.

Reads the files of checkpoints or stores. Knows no tensors and no tokenizer's code: two vocabularies are
the same if their files say the same of every token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.store_index import CONFIG_FILE
from common.strict_json import read_object

TOKENIZER_FILE = "tokenizer.json"
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model")  # of models that lack that one


def shared_vocabulary(model: Path, draft: Path) -> int:
    """How many tokens the two directories' models have in common: all of the smaller vocabulary.

    A vocabulary may be padded with numbers that mean nothing, and models of one family differ in how
    far. UsageError, with the reason, if the two differ in more. Without any tokenizer a token is a bare
    number, which means the same to both.
    """
    if not (draft / CONFIG_FILE).is_file():
        raise UsageError(
            f"draft model {draft} has no {CONFIG_FILE}: give the directory of a checkpoint or a store"
        )
    try:
        reason = _difference(model, draft)
        sizes = _vocab_size(model), _vocab_size(draft)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"draft model {draft}: its vocabulary cannot be compared with that of {model}: {error}"
        ) from error
    if reason:
        raise UsageError(
            f"draft model {draft} has another vocabulary than {model}: {reason}: give a draft with the"
            " same tokenizer"
        )
    return min(sizes)


def _difference(model: Path, draft: Path) -> str:
    """What is not the same in the two tokenizers; "" if nothing is."""
    for name in (TOKENIZER_FILE, *_OTHER_FILES):
        ours, drafts = model / name, draft / name
        if ours.is_file() != drafts.is_file():
            return f"only {'the model' if ours.is_file() else 'the draft'} has a {name}"
        if not ours.is_file() or ours.read_bytes() == drafts.read_bytes():
            found = ""
        elif name == TOKENIZER_FILE:
            found = _other_tokens(read_object(ours), read_object(drafts))
        else:
            found = f"their {name} differ"
        if found or (name == TOKENIZER_FILE and ours.is_file()):  # which says all that others would
            return found
    return ""


def _other_tokens(model: dict[str, Any], draft: dict[str, Any]) -> str:
    ours, drafts = _tokens(model), _tokens(draft)
    for token in sorted(ours.keys() | drafts.keys(), key=lambda t: ours.get(t, drafts.get(t, 0))):
        if ours.get(token) != drafts.get(token):
            numbers = [str(tokens.get(token, "none")) for tokens in (ours, drafts)]
            return f"token {token!r} is number {numbers[0]} in the model, {numbers[1]} in the draft"
    if _merges(model) != _merges(draft):
        return "their tokens are merged by other rules"
    return ""


def _tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    added = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens") or ()}
    return {**tokenizer["model"]["vocab"], **added}


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, ...]]:
    """Older files write ``a b`` for ``[a, b]``."""
    merges = tokenizer["model"].get("merges") or ()
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


def _vocab_size(path: Path) -> int:
    return int(read_object(path / CONFIG_FILE)["vocab_size"])
