"""Every message of the protocol, its limits, and how it becomes bytes. Knows no sockets.

A message is one msgpack map: ``v`` the protocol's version, ``t`` the message's type, then its fields,
all flat. Decoding is strict: a field that is missing, unknown, of another type or beyond its limit is
a ProtocolError that says what was expected. docs/protocol.md is the prose to this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgpack

from common.errors import ProtocolError

VERSION = 5
MAX_MESSAGE_BYTES = 1 << 20
MAX_TEXT = 4096
MAX_ITEMS = 1 << 16
MAX_INT = (1 << 63) - 1

Numbers = tuple[int, ...]
Fields = dict[str, int | float | str | bool]


@dataclass(frozen=True)
class Hello:
    """First message of a peer. ``role``: "engine" or "control". ``fingerprint``: the store that an
    engine in the middle of its work must have, "" for any."""

    role: str
    pid: int
    fingerprint: str
    formats: str  # comma-separated slot formats that the engine can read


@dataclass(frozen=True)
class Welcome:
    """The feeder's answer to an engine's Hello."""

    pid: int
    store: str
    fingerprint: str
    dtype: str
    device: str  # "cpu", or "cuda:" and the GPU's UUID
    strategy: str
    cache: str
    verify: bool
    engine_bytes: int  # that the engine may allocate for itself; 0 for whatever is free
    weights: int  # of the store; those of a draft model follow
    draft: str  # the draft model's store, "" if there is none
    draft_fingerprint: str


@dataclass(frozen=True)
class Export:
    """A segment the engine may map. ``kind``: "cuda-ipc" (``handle``: the 64 bytes) or "shm"
    (``handle``: the path to open). ``packed``: whether weights that can be are packed in it."""

    segment: int
    kind: str
    size_bytes: int
    handle: bytes
    packed: bool
    engine_bytes: (
        int  # as in Welcome, from now on: another slot format leaves the engine another share
    )


@dataclass(frozen=True)
class Retire:
    """The segment goes: the engine unmaps it and answers Retired."""

    segment: int


@dataclass(frozen=True)
class Retired:
    """The engine has no mapping of the segment any more."""

    segment: int


@dataclass(frozen=True)
class Plan:
    """The engine has learned the order in which a pass uses the weights."""

    weights: Numbers


@dataclass(frozen=True)
class Need:
    """The engine is blocked on this weight."""

    weight: int


@dataclass(frozen=True)
class Grant:
    """The slot is filled, complete on the device, and the engine's to read until it releases it."""

    weight: int
    slot: int
    generation: int
    segment: int
    offset_bytes: int
    size_bytes: int
    format: str  # "dequantized" or "packed", see common/formats.py
    standing: bool
    checksum: int  # of the slot's bytes in verify mode, else 0


@dataclass(frozen=True)
class Grants:
    """Several at once: lists of one length, with a place for each grant; the rest they have in common."""

    weights: Numbers
    slots: Numbers
    generations: Numbers
    segment: int
    offsets_bytes: Numbers
    sizes_bytes: Numbers
    format: str
    standing: bool
    checksums: Numbers

    @classmethod
    def of(cls, grants: Sequence[Grant]) -> Grants:
        """Of grants that share segment, format and whether they stand."""
        first = grants[0]
        return cls(
            tuple(grant.weight for grant in grants), tuple(grant.slot for grant in grants),
            tuple(grant.generation for grant in grants), first.segment,
            tuple(grant.offset_bytes for grant in grants),
            tuple(grant.size_bytes for grant in grants), first.format, first.standing,
            tuple(grant.checksum for grant in grants),
        )  # fmt: skip

    def each(self) -> Iterator[Grant]:
        """One after the other."""
        segment, kind, standing = self.segment, self.format, self.standing
        for weight, slot, generation, offset, size, checksum in zip(
            self.weights, self.slots, self.generations, self.offsets_bytes, self.sizes_bytes,
            self.checksums, strict=True,
        ):  # fmt: skip
            yield Grant(weight, slot, generation, segment, offset, size, kind, standing, checksum)


@dataclass(frozen=True)
class Release:
    """The kernels that read these grants are complete. Two lists of one length."""

    slots: Numbers
    generations: Numbers


@dataclass(frozen=True)
class Revoke:
    """The feeder asks for the grant back. The answer is a Release, when no kernel reads it."""

    slot: int
    generation: int


@dataclass(frozen=True)
class Shrink:
    """The engine is short of so many bytes of device memory. Answered by Shrunk."""

    size_bytes: int


@dataclass(frozen=True)
class Shrunk:
    """The slots take so many bytes less now, 0 if they cannot. ``engine_bytes``: as in Welcome."""

    size_bytes: int
    engine_bytes: int


@dataclass(frozen=True)
class StatusRequest:
    """What are you doing? Answered by Status."""


@dataclass(frozen=True)
class Status:
    """Answer to StatusRequest: flat numbers and texts by name."""

    fields: Fields


@dataclass(frozen=True)
class Swap:
    """Change the strategy, the cache and the slots' format ("" leaves each). Answered by Done or
    Failure."""

    strategy: str
    cache: str
    slots: str = ""


@dataclass(frozen=True)
class Stop:
    """End the feeder. Answered by Done."""


@dataclass(frozen=True)
class Done:
    """A request was carried out."""

    text: str


@dataclass(frozen=True)
class Failure:
    """Something was refused or went wrong. ``code``: one word for programs, ``text``: one line, cut to
    what a message may carry: it may quote what a peer sent."""

    code: str
    text: str

    def __post_init__(self) -> None:
        if isinstance(self.text, str):
            text = self.text.encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, "text", text[:MAX_TEXT])


@dataclass(frozen=True)
class Goodbye:
    """The sender is leaving of its own will."""

    reason: str


Message = (
    Hello | Welcome | Export | Retire | Retired | Plan | Need | Grant | Grants | Release
    | Revoke
    | Shrink | Shrunk | StatusRequest | Status | Swap | Stop | Done | Failure | Goodbye
)  # fmt: skip

TYPES: dict[str, type[Message]] = {
    "hello": Hello, "welcome": Welcome, "export": Export, "retire": Retire, "retired": Retired,
    "plan": Plan, "need": Need, "grant": Grant, "grants": Grants, "release": Release,
    "revoke": Revoke,
    "shrink": Shrink, "shrunk": Shrunk,
    "status-request": StatusRequest, "status": Status, "swap": Swap, "stop": Stop, "done": Done,
    "failure": Failure, "goodbye": Goodbye,
}  # fmt: skip
_OF_EACH_GRANT = ("weights", "slots", "generations", "offsets_bytes", "sizes_bytes", "checksums")
_NAMES = {cls: name for name, cls in TYPES.items()}


def _is_int(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def _is_bytes(value: Any) -> bool:
    return type(value) is bytes and len(value) <= MAX_TEXT


def _is_numbers(value: Any) -> bool:
    return type(value) in (tuple, list) and len(value) <= MAX_ITEMS and all(map(_is_int, value))


def _is_fields(value: Any) -> bool:
    return (
        type(value) is dict
        and len(value) <= MAX_ITEMS
        and all(
            _is_text(key) and type(item) in (int, float, str, bool) for key, item in value.items()
        )
    )


#: For each type that a field is declared with: whether a value is right, and what is expected.
_RULES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_is_int, f"an integer from 0 to {MAX_INT}"),
    bool: (_is_bool, "true or false"),
    str: (_is_text, f"text up to {MAX_TEXT}"),
    bytes: (_is_bytes, f"at most {MAX_TEXT} bytes"),
    Numbers: (_is_numbers, f"at most {MAX_ITEMS} integers from 0 to {MAX_INT}"),
    Fields: (_is_fields, "a map of names to numbers and texts"),
}
_SCHEMA = {
    cls: {f.name: _RULES[get_type_hints(cls)[f.name]] for f in dataclasses.fields(cls)}
    for cls in TYPES.values()
}


def encode(message: Message) -> bytes:
    """The message's bytes. ProtocolError if a field is not what the message declares."""
    cls = type(message)
    values = {name: getattr(message, name) for name in _SCHEMA[cls]}
    _check(cls, values)
    try:
        data: bytes = msgpack.packb({"v": VERSION, "t": _NAMES[cls], **values})
    except (OverflowError, ValueError) as error:  # beyond 64 bits, or text that is no Unicode
        raise ProtocolError(f"{_NAMES[cls]} cannot be encoded: {error}") from None
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{_NAMES[cls]} of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """The message in ``data``. ProtocolError, with what was expected, for anything else."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes: expected at most {MAX_MESSAGE_BYTES}")
    try:
        fields = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_ext_len=0,
            object_pairs_hook=_unique,
        )
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises a dozen types, all of them mean the same
        raise ProtocolError(
            f"not msgpack ({type(error).__name__}): expected one map of fields"
        ) from None
    if not isinstance(fields, dict):
        raise ProtocolError(f"{type(fields).__name__} found: expected one map of fields")
    version, kind = fields.pop("v", None), fields.pop("t", None)
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"protocol version {_short(version)} found: expected {VERSION}")
    cls = TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(
            f"message type {_short(kind)} found: expected one of {', '.join(TYPES)}"
        )
    _check(cls, fields)
    return cls(**fields)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ProtocolError("a field stands twice: expected each once")
    return fields


def _check(cls: type[Message], fields: dict[Any, Any]) -> None:
    schema = _SCHEMA[cls]
    if fields.keys() != schema.keys():
        raise ProtocolError(
            f"{_NAMES[cls]} with fields {_short(sorted(map(str, fields)))}:"
            f" expected {', '.join(schema) or 'none'}"
        )
    for name, (good, expected) in schema.items():
        if not good(fields[name]):
            raise ProtocolError(
                f"{_NAMES[cls]}.{name} is {_short(fields[name])}: expected {expected}"
            )
    if cls is Release and len(fields["slots"]) != len(fields["generations"]):
        raise ProtocolError(
            "release with two lists of different length: expected one generation a slot"
        )
    if cls is Grants and len({len(fields[name]) for name in _OF_EACH_GRANT}) != 1:
        raise ProtocolError(
            "grants with lists of different length: expected one item a grant in each"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
