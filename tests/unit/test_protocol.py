"""Messages: what is legal comes back as it was; for everything else there is one exception."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import protocol as p
from common.errors import ProtocolError

V = p.VERSION
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

OF_EACH_GRANT = [f.name for f in dataclasses.fields(p.Grants) if f.type == "Numbers"]
INTEGERS = st.integers(0, p.MAX_INT)
TEXTS = st.text(max_size=40)  # hypothesis makes no surrogates, which no UTF-8 can carry
SCALARS = (
    st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text(max_size=20)
)
LEGAL: dict[Any, st.SearchStrategy[Any]] = {
    int: INTEGERS,
    bool: st.booleans(),
    str: TEXTS,
    bytes: st.binary(max_size=80),
    p.Numbers: st.lists(INTEGERS, max_size=8).map(tuple),
    p.Fields: st.dictionaries(TEXTS, SCALARS, max_size=8),
}


def legal(cls: type[p.Message]) -> st.SearchStrategy[p.Message]:
    """Random messages of one type."""
    hints = get_type_hints(cls)
    fields = {field.name: LEGAL[hints[field.name]] for field in dataclasses.fields(cls)}
    if cls is p.Release:
        pairs = st.lists(st.tuples(INTEGERS, INTEGERS), max_size=8)
        return pairs.map(lambda x: p.Release(tuple(a for a, _ in x), tuple(b for _, b in x)))
    if cls is p.Grants:
        rest = {name: found for name, found in fields.items() if hints[name] != p.Numbers}
        rows = st.lists(st.tuples(*[INTEGERS] * len(OF_EACH_GRANT)), max_size=8)
        return st.builds(grants, rows, **rest)
    return st.builds(cls, **fields)


def grants(rows: list[tuple[int, ...]], **rest: Any) -> p.Grants:
    """Of such grants, a row of numbers for each."""
    columns = zip(*rows, strict=True) if rows else [()] * len(OF_EACH_GRANT)
    return p.Grants(**dict(zip(OF_EACH_GRANT, columns, strict=True)), **rest)


MESSAGES = st.one_of(*map(legal, p.TYPES.values()))


def example(cls: type[p.Message]) -> p.Message:
    """One legal message, always the same."""
    plain = {int: 3, bool: True, str: "x", bytes: b"h", p.Numbers: (4, 5), p.Fields: {"a": 1}}
    hints = get_type_hints(cls)
    return cls(**{field.name: plain[hints[field.name]] for field in dataclasses.fields(cls)})


def packed(message: p.Message, **changes: Any) -> bytes:
    """The message's bytes, some of its fields changed as the sender's own code would not."""
    (name,) = [name for name, cls in p.TYPES.items() if cls is type(message)]
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return msgpack.packb({"v": p.VERSION, "t": name} | fields | changes)  # type: ignore[no-any-return]


def refused(data: bytes) -> str:
    """The one line with which ``data`` is refused."""
    with pytest.raises(ProtocolError) as caught:
        p.decode(data)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def test_every_type_has_a_name_and_every_name_a_type() -> None:
    assert {*p.TYPES.values()} == set(p.Message.__args__)  # type: ignore[attr-defined]
    assert len({*p.TYPES.values()}) == len(p.TYPES)


@pytest.mark.parametrize("cls", p.TYPES.values())
def test_round_trip(cls: type[p.Message]) -> None:
    @given(legal(cls))
    @settings(QUICK, max_examples=30)
    def check(message: p.Message) -> None:
        back = p.decode(p.encode(message))
        assert back == message
        assert type(back) is cls
        for field in dataclasses.fields(cls):
            assert type(getattr(back, field.name)) is type(getattr(message, field.name))

    check()


@pytest.mark.parametrize("cls", p.TYPES.values())
def test_the_bytes_are_one_flat_map(cls: type[p.Message]) -> None:
    message = example(cls)
    assert p.encode(message) == packed(message)


@given(st.binary(max_size=300))
@settings(QUICK, max_examples=400)
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)


JSONISH = st.recursive(
    st.none() | SCALARS | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@given(JSONISH)
@settings(QUICK, max_examples=200)
def test_other_values_are_refused(value: Any) -> None:
    refused(msgpack.packb(value))


@given(message=MESSAGES, data=st.data())
@settings(QUICK, max_examples=400)
def test_mutated_bytes_are_a_message_or_refused(message: p.Message, data: st.DataObject) -> None:
    mutated = bytearray(p.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                mutated[at] = data.draw(st.integers(0, 255))
            case 1:
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=3))
            case 2 if len(mutated) > 1:
                del mutated[at]
    try:
        found = p.decode(bytes(mutated))
    except ProtocolError:
        return
    p.encode(found)  # what was let through is legal


@given(message=MESSAGES, data=st.data())
@settings(QUICK, max_examples=150)
def test_a_piece_of_a_message_is_refused(message: p.Message, data: st.DataObject) -> None:
    whole = p.encode(message)
    refused(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(whole + data.draw(st.binary(min_size=1, max_size=4)))
    refused(whole + whole)


@pytest.mark.parametrize(
    "version", [0, V - 1, V + 1, -V, float(V), True, str(V), str(V).encode(), None, [V]]
)
def test_another_version_is_refused(version: Any) -> None:
    assert refused(packed(p.Stop(), v=version)).endswith(f"found: expected {V}")


def test_no_version_is_refused() -> None:
    assert f"protocol version None found: expected {V}" in refused(msgpack.packb({"t": "stop"}))


@pytest.mark.parametrize(
    "kind", ["", "Stop", "stop ", "granted", "x" * 5000, 0, None, b"stop", ["a"]]
)
def test_an_unknown_type_is_refused(kind: Any) -> None:
    assert "expected one of hello, welcome, export" in refused(packed(p.Stop(), t=kind))


@pytest.mark.parametrize("cls", p.TYPES.values())
def test_fields_are_exactly_those_declared(cls: type[p.Message]) -> None:
    message = example(cls)
    assert p.decode(packed(message)) == message
    whole = msgpack.unpackb(packed(message))
    for name in ("extra", "", "V", b"v", b"weight"):
        text = refused(msgpack.packb(whole | {name: 1}))
        assert all(field.name in text for field in dataclasses.fields(cls))
    for field in dataclasses.fields(cls):
        without = {name: value for name, value in whole.items() if name != field.name}
        assert field.name in refused(msgpack.packb(without))


@pytest.mark.parametrize("cls", p.TYPES.values())
def test_a_field_that_stands_twice_is_refused(cls: type[p.Message]) -> None:
    pairs = list(msgpack.unpackb(packed(example(cls))).items())
    for pair in pairs:
        doubled = msgpack.Packer().pack_map_pairs([*pairs, pair])
        assert refused(doubled) == "a field stands twice: expected each once"
    status = [("v", V), ("t", "status")]
    inner = msgpack.packb("fields") + msgpack.Packer().pack_map_pairs([("a", 1), ("a", 1)])
    outer = b"\x83" + b"".join(msgpack.packb(word) for pair in status for word in pair) + inner
    assert refused(outer) == "a field stands twice: expected each once"


#: For each type a field is declared with: values that are not of it.
ILLEGAL: dict[Any, list[Any]] = {
    int: [-1, 1 << 63, (1 << 64) - 1, True, False, 1.0, "1", b"1", None, [1], {"a": 1}],
    bool: [0, 1, "true", None, 1.0, []],
    str: [b"x", 1, None, True, ["x"], {"a": 1}, "x" * (p.MAX_TEXT + 1)],
    bytes: ["x", 1, None, [1], b"x" * (p.MAX_TEXT + 1)],
    p.Numbers: [1, "12", b"12", None, {"a": 1}, [-1], [1 << 63], [True], [1.0], ["1"], [[1]], [None],
                [0] * (p.MAX_ITEMS + 1)],
    p.Fields: [1, "x", None, [], [["a", 1]], {"a": None}, {"a": b"x"}, {"a": [1]}, {"a": {"b": 1}},
               {b"a": 1}, {"x" * (p.MAX_TEXT + 1): 1},
               {str(i): 0 for i in range(p.MAX_ITEMS + 1)}],
}  # fmt: skip
EVERY_FIELD = [
    (cls, field.name, get_type_hints(cls)[field.name])
    for cls in p.TYPES.values()
    for field in dataclasses.fields(cls)
]


@pytest.mark.parametrize(("cls", "name", "declared"), EVERY_FIELD)
def test_an_illegal_value_is_neither_decoded_nor_encoded(
    cls: type[p.Message], name: str, declared: Any
) -> None:
    message = example(cls)
    for value in ILLEGAL[declared]:
        data = packed(message, **{name: value})
        assert name in refused(data), value
        if (cls, name) == (p.Failure, "text") and type(value) is str:
            continue  # cut instead, see below
        made = cls(
            **({f.name: getattr(message, f.name) for f in dataclasses.fields(cls)} | {name: value})
        )
        with pytest.raises(ProtocolError, match=name):
            p.encode(made)


@pytest.mark.parametrize(("cls", "name", "declared"), EVERY_FIELD)
def test_the_limits_themselves_are_legal(cls: type[p.Message], name: str, declared: Any) -> None:
    limits = {
        int: [0, p.MAX_INT],
        bool: [False, True],
        str: ["", "x" * p.MAX_TEXT, "\U0001f600" * p.MAX_TEXT, "\0\n"],
        bytes: [b"", b"\xff" * p.MAX_TEXT],
        p.Numbers: [(), (0, p.MAX_INT), tuple(range(p.MAX_ITEMS))],
        p.Fields: [{}, {"x" * p.MAX_TEXT: -1}, {str(i): 0.5 for i in range(p.MAX_ITEMS)}],
    }
    for value in limits[declared]:
        changes = {name: value}
        if cls is p.Release:
            changes = {"slots": value, "generations": value}
        if cls is p.Grants and declared == p.Numbers:
            # Six lists of the most items are too large together.
            changes = dict.fromkeys(OF_EACH_GRANT, value[: p.MAX_ITEMS // 4])
        message = dataclasses.replace(example(cls), **changes)
        assert p.decode(p.encode(message)) == message


def test_a_release_names_one_generation_a_slot() -> None:
    for slots, generations in [((1,), ()), ((), (1,)), ((1, 2), (1, 2, 3))]:
        with pytest.raises(ProtocolError, match="one generation a slot"):
            p.encode(p.Release(slots, generations))
        assert "one generation a slot" in refused(
            packed(p.Release((), ()), slots=slots, generations=generations)
        )


def test_grants_have_one_item_a_grant_in_each_list() -> None:
    whole = grants(
        [(1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12)], segment=13, format="x", standing=True
    )
    assert list(whole.each()) == [
        p.Grant(1, 2, 3, 13, 4, 5, "x", True, 6), p.Grant(7, 8, 9, 13, 10, 11, "x", True, 12),
    ]  # fmt: skip
    assert p.Grants.of(list(whole.each())) == whole
    for name in OF_EACH_GRANT:
        for other in ((), (1,), (1, 2, 3)):
            with pytest.raises(ProtocolError, match="one item a grant"):
                p.encode(dataclasses.replace(whole, **{name: other}))
            assert "one item a grant" in refused(packed(whole, **{name: other}))


def test_a_message_that_is_too_large_is_refused() -> None:
    assert "expected at most 1048576" in refused(b"\0" * (p.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ProtocolError, match="exceeds 1048576"):
        p.encode(p.Status({"text": "x" * p.MAX_MESSAGE_BYTES}))
    # The items are few enough for a list, and all of them legal, but two lists are too much.
    with pytest.raises(ProtocolError, match="exceeds 1048576"):
        p.encode(p.Release((p.MAX_INT,) * p.MAX_ITEMS, (p.MAX_INT,) * p.MAX_ITEMS))


@pytest.mark.parametrize(
    "message",
    [
        p.Status({"much": 1 << 64}),
        p.Status({"little": -(1 << 63) - 1}),
        p.Status({"no text": "\ud800"}),
        p.Status({"\udcff": 1}),
        p.Done("caf\udce9"),
    ],
)
def test_what_msgpack_cannot_carry_is_refused(message: p.Message) -> None:
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        p.encode(message)


def test_text_that_is_no_utf8_is_refused() -> None:
    data = packed(p.Done("caf?"))
    assert "not msgpack" in refused(data.replace(b"caf?", b"caf\xe9"))


def test_a_failure_can_always_be_said() -> None:
    """It may quote what a peer sent, or the path of a file, and must not fail for it."""
    for text in ("x" * 100_000, "role " + "\0" * p.MAX_TEXT, "caf\udce9 and \ud800", ""):
        back = p.decode(p.encode(p.Failure("code", text)))
        assert isinstance(back, p.Failure)
        assert back.text == text.encode(errors="backslashreplace").decode()[: p.MAX_TEXT]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        b"\x91" * 100_000,  # nested deeper than any stack
        b"\xdd\xff\xff\xff\xff",  # a list that claims four billion items
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xdb\xff\xff\xff\xff",  # text of as many bytes
        b"\xc7\x00\x05",  # extensions
        b"\xd6\xff\0\0\0\0",  # a timestamp
        b"\x81\x01\x01",  # a number for a name
        b"\x81\xc0\x01",
        b"\x81\x91\x01\x01",
    ],
)
def test_hostile_msgpack_is_refused(data: bytes) -> None:
    refused(data)
    status = (
        b"\x83"
        + msgpack.packb("v")
        + msgpack.packb(V)
        + msgpack.packb("t")
        + msgpack.packb("status")
    )
    refused(status + msgpack.packb("fields") + data)


@given(value=JSONISH, where=st.sampled_from(EVERY_FIELD))
@settings(QUICK, max_examples=300)
def test_any_value_in_any_field(value: Any, where: tuple[type[p.Message], str, Any]) -> None:
    cls, name, declared = where
    kinds = {int: int, bool: bool, str: str, bytes: bytes, p.Numbers: list, p.Fields: dict}
    data = packed(example(cls), **{name: value})
    if type(value) is not kinds[declared]:
        refused(data)
        return
    try:
        found = p.decode(data)
    except ProtocolError:
        return
    assert type(found) is cls
    p.encode(found)
