"""What users get wrong: each is answered by one clear line and an exit code, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.store import Store
from feeder.budget import slot_sizes
from tests.checkpoints import make_checkpoint
from tests.processes import Ended, Room, assert_refused

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def one_by_one(room: Room, module: str, argvs: list[list[str]]) -> list[Ended]:
    """What ``python -m MODULE`` says to each command line."""
    ended = room.start("-m", "tests.process.one_by_one", module, json.dumps(argvs)).wait()
    assert ended.code == 0, ended.err
    return [Ended(**fields) for fields in json.loads(ended.out)]


def assert_one_line(ended: Ended, message: str, code: int) -> None:
    """Nothing but that one line."""
    assert_refused(ended, message, code=code)
    assert ended.err == ended.last_line + "\n"
    assert ended.out == ""


# The launcher finds these itself, at once.
LAUNCHER = {
    "--cache=0": "cache '0' holds no weight",
    "--cache=-2": "cache '-2' holds no weight",
    "--cache=a lot": "cache 'a lot' is not understood",
    "--cache=10 parsecs": "cache '10 parsecs' is not understood",
    "--cache=0.1B": "cache '0.1B' is not understood",
    "--model=/nowhere/at/all": "model /nowhere/at/all is no directory",
    "--dtype=int4": "argument --dtype: invalid choice: 'int4'",
    "--attention=best": "argument --attention: invalid choice: 'best'",
    "--seed=many": "argument --seed: invalid int value: 'many'",
    "--temperature=warm": "argument --temperature: invalid float value: 'warm'",
    "--temperature=-3": "--temperature -3.0: expected from 0 (greedy) to 100",
    "--top-p=2": "--top-p 2.0: expected above 0, at most 1",
    "--max-new-tokens=1.5": "argument --max-new-tokens: invalid int value: '1.5'",
    "--strategy=best": "strategy 'best' is not known: name one of ring, resident, on-demand",
    "--strategy=none.py:Mine": "strategy file none.py does not exist",
    "--name=a/b": "name 'a/b' is not usable",
    "--name=..": "name '..' is not usable",
    "--name=": "name '' is not usable",
    "--prompt": "argument --prompt: expected one argument",
    "--cash=3": "unrecognized arguments: --cash=3",
}


def test_the_launcher_says_at_once(room: Room, tmp_path: Path) -> None:
    launchers = {flag: room.launch(flag) for flag in LAUNCHER}
    for flag, message in LAUNCHER.items():
        assert_one_line(launchers[flag].wait(), message, code=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    ended = room.launch(f"--model={empty}").wait()
    assert_one_line(ended, f"{empty} has neither model.safetensors nor", code=1)


def test_feeder(room: Room, small_store: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    store = Store.open(small_store)
    largest = max(slot_sizes(store, torch.bfloat16, ["dequantized"] * len(store.weights)))
    model = f"--model={small_store}"
    bad = tmp_path / "bad.py"
    bad.write_text("class Mine:\n    pass\n\nraise ValueError('oh')\n")
    mistakes = [
        ([f"--model={checkpoint}"], f"{checkpoint} is a checkpoint, not a store: run", 1),
        ([f"--model={tmp_path}"], "so it is not a store; make one with", 1),
        (["--model=/nowhere/at/all"], "/nowhere/at/all is not a directory", 1),
        ([], "the following arguments are required: --model", 2),
        ([model, "--cache=0"], "cache '0' holds no weight", 2),
        ([model, "--cache=automatic"], "a size such as 10GiB, or auto", 2),
        ([model, "--vram=8"], "size '8' is not understood: write a number and a unit", 2),
        ([model, "--context=0"], "--context 0: expected a number of tokens, at least 1", 2),
        ([model, "--strategy=best"], "strategy 'best' is not known: name one of ring, ", 2),
        ([model, "--strategy=/nowhere/s.py:Mine"], "/nowhere/s.py does not exist", 2),
        ([model, f"--strategy={bad}:Mine"], "ValueError: oh", 2),
        ([model, "--dtype=float64"], "argument --dtype: invalid choice: 'float64'", 2),
        ([model, "--device=tpu"], "device 'tpu'", 1),
        ([model, "--name=a/b"], "name 'a/b' is not usable", 2),
        (
            [model, "--dtype=bfloat16", f"--cache={largest - 1}B"],
            f"needs {largest / 1000:.3g} kB ({largest:,} bytes) in a slot: give at least that much",
            1,
        ),
        (["stop", "--name=nobody"], "no feeder 'nobody' is running", 1),
        (["swap", "ring"], "no feeder 'default' is running", 1),
        (["status", "--name=a/b"], "name 'a/b' is not usable", 2),
    ]
    answers = one_by_one(room, "feeder", [argv for argv, _, _ in mistakes])
    for ended, (_, message, code) in zip(answers, mistakes, strict=True):
        assert_one_line(ended, message, code)


@without_gpu
def test_no_gpu(room: Room, small_store: Path) -> None:
    ended = room.launch(f"--model={small_store}", "--feeder-only", "--device=cuda").wait()
    assert_refused(ended, "error: feeder: device 'cuda': no usable GPU found", code=1)
    assert "--device cpu" in ended.last_line


def test_engine(room: Room, small_store: Path, tmp_path: Path) -> None:
    """Its flags and its files, before it looks for a feeder."""

    def file(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return f"--prompts={path}"

    good = file("good.jsonl", '{"input": "1 2 3"}\n')
    first = '{"input": "1", "expected_output": "2"}\n'
    mistakes = [
        ([], "give either --prompt TEXT or --prompts FILE"),
        (["--prompt=1", good], "give either --prompt TEXT or --prompts FILE"),
        (["--batch=0", good], "--batch 0: expected from 1 to 256"),
        (["--batch=2", "--speculate=lookup", good], "leave out one of the two"),
        (["--prompt=1", "--output=x"], "--output is for the answers of --prompts"),
        ([good, f"--output={tmp_path / 'good.jsonl'}"], "good.jsonl exists: remove it"),
        ([good, "--output=/nowhere/x"], "output file /nowhere/x cannot be written: No such file"),
        (["--prompts=/nowhere/x"], "prompts file /nowhere/x cannot be read"),
        ([file("a", "")], "a holds no prompt"),
        ([file("b", first + "\nnonsense\n")], "b, line 3: not JSON"),
        ([file("c", first + '["no", "object"]\n')], "c, line 2: expected {"),
        ([file("d", first * 2 + '{"input": 5}\n')], "d, line 3: expected {"),
        ([file("e", '{"input": "1", "expected_output": 2}')], "e, line 1: expected_output is no"),
        ([file("f", '[{"input": "1"}, {"prompt": "1"}]')], "f, entry 2: expected {"),
        ([file("g", '[{"input": "1"},')], "g is not a JSON list"),
        ([file("h", b"\xff\xfe\x00")], "h cannot be read"),
        ([file("i", "[" * 100_000)], "i is not a JSON list"),
        (["--prompt=1", "--temperature=-1"], "--temperature -1.0: expected from 0"),
        (["--prompt=1", "--temperature=nan"], "--temperature nan: expected from 0"),
        (["--prompt=1", "--temperature=1000"], "--temperature 1000.0: expected from 0"),
        (["--prompt=1", "--top-p=0"], "--top-p 0.0: expected above 0"),
        (["--prompt=1", "--top-p=1.01"], "--top-p 1.01: expected above 0"),
        (["--prompt=1", "--top-k=-1"], "--top-k -1: expected at least 0"),
        (["--prompt=1", "--max-new-tokens=0"], "--max-new-tokens 0: expected at least 1"),
        (["--prompt=1", "--repetition-penalty=0"], "--repetition-penalty 0.0: expected above 0"),
        (["--prompt=1", "--seed=-1"], "--seed -1: expected from 0"),
        (["--prompt=1", f"--seed={1 << 32}"], f"--seed {1 << 32}: expected from 0"),
        (["--prompt=1", "--name=a/b"], "name 'a/b' is not usable"),
    ]
    answers = one_by_one(room, "engine", [argv for argv, _ in mistakes])
    for ended, (_, message) in zip(answers, mistakes, strict=True):
        assert_one_line(ended, message, code=2)
    assert (tmp_path / "good.jsonl").read_text() == '{"input": "1 2 3"}\n'


def test_engine_with_a_feeder(room: Room, small_store: Path) -> None:
    """What shows only when the model is there: in turn, so each leaves the feeder in good order."""
    room.feeder(f"--model={small_store}", "--cache=3")
    mistakes = [
        (["--prompt="], "the prompt is empty: give at least one token", 2),
        (["--prompt=1 2 x"], "expected a prompt of token ids, such as '1 2 3'", 2),
        (["--prompt=1 320"], "each below 320", 2),
        ([f"--prompt={'1 ' * 512}"], "has 512 tokens, the model's context 512: shorten it", 2),
        (["--prompt=1", "--attention=flash_attention_2"], "flash_attention_2 cannot be used", 1),
    ]
    argvs = [argv for argv, _, _ in mistakes]
    answers = one_by_one(room, "engine", [*argvs, ["--prompt=1 2 3", "--max-new-tokens=2"]])
    for ended, (_, message, code) in zip(answers, mistakes, strict=False):
        assert_one_line(ended, message, code)
    assert answers[-1].code == 0
    assert len(answers[-1].out.split()) == 2


def test_the_launcher_repeats_what_its_children_say(
    room: Room, small_store: Path, tmp_path: Path
) -> None:
    """A mistake that a child finds ends the other one, and is the last line."""
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"input": "1"}\n{"inputs": "2"}\n')
    (tmp_path / "prompts.jsonl.py").touch()
    cases = {
        "strategy": (
            [f"--strategy={source}.py:A"],
            f"error: feeder: {source}.py has no class A",
            2,
        ),
        "cache": (["--cache=1KiB"], "error: feeder: cache 1KiB holds not even one weight", 1),
        "prompts": (
            [f"--prompts={source}"],
            f"error: engine: prompts file {source}, line 2: expected",
            2,
        ),
    }
    launchers = {
        name: room.launch(f"--model={small_store}", f"--name={name}", *flags)
        for name, (flags, _, _) in cases.items()
    }
    for name, (_, message, code) in cases.items():
        ended = launchers[name].wait()
        assert_refused(ended, message, code=code)
        assert ended.out == ""
