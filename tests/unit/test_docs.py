"""What the documents say of the code is what the code says.

Compared are names, tables and links. Prose is for people to check.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from common import protocol
from common.families import FAMILIES
from common.slots import TRANSITIONS, State
from feeder.strategies.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("demo/*.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in found}


def state_diagram() -> str:
    """The mermaid stateDiagram of the slot table, one line a transition, in the table's order."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.FREE.name}"]
    for (state, event), after in TRANSITIONS.items():
        lines.append(f"    {state.name} --> {after.name}: {event.value}")
    return "\n".join(lines) + "\n"


def test_state_diagram_is_the_table() -> None:
    found = re.findall(
        r"^```mermaid\n(stateDiagram.*?)^```$", read("docs/architecture.md"), re.M | re.S
    )
    assert found == [state_diagram()]


def test_every_state_is_explained() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| .+ \|$", read("docs/architecture.md"), re.M)
    assert rows == [state.name for state in State]


def test_protocol_names_every_message_and_field() -> None:
    text = read("docs/protocol.md")
    messages = text.partition("\n## Messages\n")[2].partition("\n## ")[0]
    sections = re.split(r"^### ", messages, flags=re.M)[1:]
    found = {
        re.match(r"`(.+)`\n", section)[1]: re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", section, re.M)
        for section in sections
    }
    found["failure"] = [name for name in found["failure"] if name in ("code", "text")]
    expected = {
        name: [field.name for field in dataclasses.fields(cls)]
        for name, cls in protocol.TYPES.items()
    }
    assert found == expected


def test_protocol_names_the_kind_of_every_field() -> None:
    kinds = {"int": "integer", "bool": "bool", "str": "text", "bytes": "bytes"}
    kinds |= {"Numbers": "integers", "Fields": "map"}
    for section in re.split(r"^### ", read("docs/protocol.md"), flags=re.M)[1:]:
        cls = protocol.TYPES[re.match(r"`(.+)`\n", section)[1]]
        for field in dataclasses.fields(cls):
            row = f"| `{field.name}` | {kinds[str(field.type)]} |"
            assert row in section, f"{cls.__name__}: {row}"


def test_protocol_states_version_and_limits() -> None:
    text = read("docs/protocol.md")
    assert text.startswith(f"# The protocol, version {protocol.VERSION}\n")
    for limit in (
        f"{protocol.MAX_TEXT} characters",
        f"{protocol.MAX_TEXT} bytes",
        f"{protocol.MAX_ITEMS:,} items",
        f"{protocol.MAX_MESSAGE_BYTES >> 20} MiB",
    ):
        assert f" {limit} |" in text, limit
    assert protocol.MAX_INT == 2**63 - 1 and "0 to 2⁶³ − 1" in text


def test_protocol_names_every_failure_code() -> None:
    sources = [*ROOT.glob("feeder/*.py"), *ROOT.glob("engine/*.py")]
    sent = {
        code
        for path in sources
        for code in re.findall(
            r'(?:Failure|complain)\(\s*"([a-z-]+)"', path.read_text(encoding="utf-8")
        )
    }
    assert sent
    section = read("docs/protocol.md").partition("### `failure`")[2].partition("### `goodbye`")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \| (?:both|feeder|engine) \|", section, re.M)
    assert sorted(rows) == sorted(sent)


def test_readme_names_every_strategy() -> None:
    rows = re.findall(r"^\| `([a-z-]+)`(?: \(default\))? \| .+ \|$", read("README.md"), re.M)
    assert [name for name in rows if name in BUILT_IN] == list(BUILT_IN)


def test_readme_names_every_family() -> None:
    limits = read("README.md").partition("\n## Limits\n")[2].partition("\n## ")[0]
    named = re.search(r"`model_type` (.+?)\)", limits)
    assert named is not None
    assert re.findall(r"\w+", named[1]) == list(FAMILIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            assert anchor in anchors(page.parent / path if path else page), target
