"""A draft model beside the demo: lent by the feeder, planned for, gone with its feeder, and refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UsageError
from common.store import Store
from common.vocabulary import shared_vocabulary
from feeder.quantize import quantize_checkpoint
from tests import fed, speculating
from tests.process.test_launch import DEMO_TEXT, summary_of
from tests.processes import DEMO, Room, assert_refused, until

DRAFT = DEMO.parent / "draft"


@pytest.fixture(scope="module")
def draft_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "store"
    quantize_checkpoint(DRAFT, path, "cpu", progress=False, method="absmax")
    return path


def test_a_run_with_a_draft(room: Room, demo_store: Path, draft_store: Path) -> None:
    """In verify mode, so that every slot of the draft is looked at too."""
    flags = (f"--model={demo_store}", "--cache=9", f"--speculate={draft_store}:6", "--verify")
    ended = room.launch(*flags, "--json").wait()
    fields = summary_of(ended)
    assert (ended.code, ended.out, fields["speculate"]) == (0, DEMO_TEXT, "draft:6"), ended.err
    assert 0 < fields["drafted_passes"] <= fields["wide_passes"] < fields["passes"]
    assert fields["candidates"] <= 6 * fields["wide_passes"]
    assert fields["accepted"] > 0 and fields["drafting_s"] > 0
    assert fields["passes"] < fields["tokens"] - 1
    draft_bytes = sum(weight.elements for weight in Store.open(draft_store).weights) * 4
    assert fields["feeder_peak_bytes"] > draft_bytes + 9 * 1024  # both have slots


def test_the_plan_shows_both(room: Room, demo_store: Path, draft_store: Path) -> None:
    """Both are in one bound: what holds the model alone is too small for the two."""
    flags = [f"--model={demo_store}", f"--speculate={draft_store}", "--context=64", "--plan"]
    plan = room.launch(*flags, "--device=cpu", "--vram=90MB")
    refused = room.launch(*flags, "--device=cpu", "--vram=78MB", "--name=other")
    assert plan.wait().code == 0, plan.err
    lines = plan.out.splitlines()
    weights = len(Store.open(draft_store).weights)
    line = (
        rf"draft model store, [\d.]+ kB packed in {weights} weights: resident in [\d.]+ MB of slots"
    )
    assert re.match(line, lines[1]), plan.out
    beside = next(line for line in lines if line.startswith("beside the slots: "))
    assert ", the draft model's slots " in beside and ", the draft model's KV cache" in beside
    assert_refused(refused.wait(), "--vram gives 78 MB and a run needs at least ", code=1)
    assert ", the draft model's slots " in refused.err
    assert refused.err.rstrip().endswith("or a smaller --context, or no draft model")


class Interrupted(speculating.Always):
    """Calls something amid a text, when so many tokens are there."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.calls: dict[int, Callable[[], object]] = {}
        self.said = 0

    def begin(self, prompt: list[int], repeatable: bool = True) -> None:
        super().begin(prompt, repeatable)
        self.said = 0

    def add(self, token: int) -> None:
        super().add(token)
        self.said += 1
        if call := self.calls.pop(self.said, None):
            call()


def test_feeders_with_another_draft_take_over(
    room: Room, small_store: Path, tmp_path: Path
) -> None:
    """One has another draft, the next the same again: the text goes on, and drafting when it can."""
    small_draft = tmp_path / "draft"
    checkpoint = small_store.parent / "model"
    quantize_checkpoint(checkpoint, small_draft, "cpu", progress=False, method="absmax")
    model_flag = f"--model={small_store}"
    feeders = [room.feeder(model_flag, f"--draft={small_draft}", "--cache=4")]
    drafted: list[int] = []

    def replace(*flags: str) -> None:
        drafted.append(speculation.figures()["drafted_passes"])
        feeders[-1].signal(signal.SIGKILL)
        feeders[-1].popen.wait()
        # What stays needs no feeder: a text could be at its end before anybody had looked.
        lost = len(feeders)
        until(lambda: engine.client.lost_feeders == lost, lambda: "nobody misses the feeder")
        feeders.append(room.feeder(model_flag, *flags))

    with fed.connected(room, feeders[0]) as engine:
        model, speculation = fed.build(engine), Interrupted(4)
        loop = speculating.loop(speculation, fed.draft(engine))
        options = {"max_new_tokens": 44, "min_new_tokens": 44, "do_sample": False}
        plain = speculating.generate(model, [5, 17, 300], speculating.loop(), **options)
        speculation.calls = {
            12: lambda: replace(f"--draft={small_store}"),
            26: lambda: replace(f"--draft={small_draft}", "--cache=-1"),
        }
        assert speculating.generate(model, [5, 17, 300], loop, **options) == plain
        drafted.append(speculation.figures()["drafted_passes"])
        assert engine.client.lost_feeders == 2 and not speculation.calls
        first_weight = len(engine.store.weights)
        assert engine.client.stay(range(first_weight, 2 * first_weight))
    first, second, last = drafted
    assert first > 0 and second == first + 1  # the pass that was under way
    assert second < last


def edited(directory: Path, edit: Callable[[dict[str, object]], object]) -> Path:
    """The demo, with another tokenizer."""
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    edit(tokenizer)
    file.write_text(json.dumps(tokenizer))
    return directory


def swap_tokens(tokenizer: dict[str, object]) -> None:
    vocab = tokenizer["model"]["vocab"]  # type: ignore[index]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def test_which_vocabularies_go_together(tmp_path: Path, small_store: Path) -> None:
    assert shared_vocabulary(DEMO, DRAFT) == 320
    spelled = edited(tmp_path / "spelled", lambda t: t["model"].update(  # type: ignore[attr-defined]
        merges=[" ".join(pair) for pair in t["model"]["merges"]]  # type: ignore[index]
    ))  # fmt: skip
    config = spelled / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": 384'))
    assert shared_vocabulary(spelled, DEMO) == shared_vocabulary(DEMO, spelled) == 320
    assert shared_vocabulary(small_store, small_store) == 320
    swapped = edited(tmp_path / "swapped", swap_tokens)
    merged = edited(tmp_path / "merged", lambda t: t["model"]["merges"].reverse())  # type: ignore[index]
    more = edited(
        tmp_path / "more",
        lambda t: t["added_tokens"].append({"id": 320, "content": "<think>"}),  # type: ignore[attr-defined]
    )
    for other, reason in [
        (swapped, r"token '[ab]' is number \d+ in the model, \d+ in the draft"),
        (merged, "merged by other rules"),
        (more, "token '<think>' is number none in the model, 320 in the draft"),
        (small_store, "only the model has a tokenizer.json"),
        (tmp_path, "has no config.json: give the directory of a checkpoint or a store"),
    ]:
        with pytest.raises(UsageError, match=reason):
            shared_vocabulary(DEMO, other)


def test_mistakes(room: Room, demo_store: Path, small_store: Path) -> None:
    model = f"--model={demo_store}"
    other = f"--speculate={small_store}"
    assert_refused(room.launch(model, other).wait(), "has another vocabulary than", code=2)
    assert_refused(
        room.launch(model, "--speculate=draft").wait(), "give the draft model's directory"
    )
    assert_refused(
        room.start("-m", "feeder", model, f"--draft={small_store}").wait(), "another vocabulary"
    )
    room.feeder(model, "--cache=9")
    assert_refused(room.engine("--prompt=1", "--speculate=draft").wait(), "has no draft model")
