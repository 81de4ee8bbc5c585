"""`python -m feeder.quantize` as a user meets it: one line for each mistake, and no debris."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.store import Store
from feeder import quantize
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint, make_hollow_checkpoint

ROOT = Path(__file__).parents[2]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "feeder.quantize", *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


def assert_refused(result: subprocess.CompletedProcess[str], message: str, code: int = 1) -> None:
    """Exactly one line, on stderr, that begins "error: " and contains `message`.

    On a busy machine lines on the progress come before it.
    """
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("quantizing: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert result.returncode == code


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("checkpoints")
    return {
        "single": make_checkpoint(path / "single"),
        "sharded": make_checkpoint(path / "sharded", shard_size="60KB"),
        "tied": make_checkpoint(path / "tied", tied=True),
    }


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({name: tensor}))


def remove_tensor(name: str) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.pop(name))


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


REFUSALS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no directory": ("single", shutil.rmtree, "does not exist, expected a checkpoint directory"),
    "no config": ("single", lambda p: (p / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (
        "single",
        lambda p: (p / "config.json").write_text('{"model_type": '),
        "config.json: not valid JSON (line 1, column 16",
    ),
    "another model": (
        "single",
        lambda p: edit_config(p, model_type="gemma2"),
        "model_type is 'gemma2', which is not supported; supported are qwen2",
    ),
    "absurd size": (
        "single",
        lambda p: edit_config(p, hidden_size=-96),
        "hidden_size is -96, expected a positive integer",
    ),
    "heads do not divide": (
        "single",
        lambda p: edit_config(p, num_key_value_heads=3),
        "num_attention_heads is 4, expected a multiple of num_key_value_heads, 3",
    ),
    "other dtype": (
        "single",
        lambda p: edit_config(p, dtype="float64"),
        "dtype is 'float64', expected one of bfloat16, float16, float32",
    ),
    "quantized in a way that is not known": (
        "single",
        lambda p: edit_config(p, quantization_config={"quant_method": "bitsandbytes"}),
        "quant_method is 'bitsandbytes', expected one of gptq, awq, compressed-tensors",
    ),
    "no tensors": (
        "single",
        lambda p: (p / "model.safetensors").unlink(),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickles only": ("single", pickle_only, "convert it"),
    "missing shard": (
        "sharded",
        lambda p: next(p.glob("model-00003*")).unlink(),
        "is missing, expected a safetensors file; fetch the checkpoint again",
    ),
    "truncated shard": (
        "sharded",
        lambda p: os.truncate(next(p.glob("model-00003*")), 10_000),
        "is truncated: it has 10000 bytes, its header promises",
    ),
    "truncated header": (
        "single",
        lambda p: os.truncate(p / "model.safetensors", 100),
        "is truncated: it has 100 bytes, its header alone takes",
    ),
    "not safetensors": (
        "single",
        lambda p: (p / "model.safetensors").write_text("version https://git-lfs"),
        "is no safetensors file",
    ),
    "malformed index": (
        "sharded",
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        "found the file '../b', expected a name such as",
    ),
    "index names what the shard lacks": (
        "sharded",
        lambda p: shutil.copy(next(p.glob("model-00001*")), next(p.glob("model-00002*"))),
        "which model.safetensors.index.json says it holds",
    ),
    "missing weight": (
        "single",
        remove_tensor(Q_PROJ),
        f"lacks {Q_PROJ}, which its config expects",
    ),
    "missing head": ("single", remove_tensor("lm_head.weight"), "lacks lm_head.weight"),
    "unknown weight": (
        "single",
        set_tensor("model.layers.0.mlp.extra.weight", torch.ones(3)),
        "has 'model.layers.0.mlp.extra.weight', which a qwen2 of this config does not",
    ),
    "more layers than the config says": (
        "single",
        lambda p: edit_config(p, num_hidden_layers=1, layer_types=["full_attention"]),
        "has 'model.layers.1.",
    ),
    "wrong shape": (
        "single",
        set_tensor(Q_PROJ, torch.ones(96, 95)),
        f"{Q_PROJ} has the shape [96, 95], expected [96, 96] by the config",
    ),
    "wrong dtype": (
        "single",
        set_tensor(Q_PROJ, torch.ones(96, 96, dtype=torch.int8)),
        f"{Q_PROJ} is I8, expected one of BF16, F16, F32",
    ),
    "NaN in a weight": ("single", set_value(Q_PROJ, float("nan")), f"{Q_PROJ}: found NaN or Inf"),
    "Inf in a resident": (
        "single",
        set_value("model.norm.weight", float("inf")),
        "model.norm.weight: found NaN or Inf",
    ),
    "tied head that differs": (
        "tied",
        set_tensor("lm_head.weight", torch.ones(320, 96, dtype=torch.bfloat16)),
        "lm_head.weight differs from the embedding",
    ),
}


@pytest.mark.parametrize(("base", "damage", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_with_one_line(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    base: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    model = shutil.copytree(checkpoints[base], tmp_path / "model")
    damage(model)
    assert_refused(run(model, tmp_path / "store", "--device", "cpu"), message)
    assert set(os.listdir(tmp_path)) <= {"model"}


def test_existing_target_is_refused_and_kept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "precious").touch()
    assert_refused(run(checkpoints["single"], tmp_path / "store"), "exists; remove it first")
    assert os.listdir(tmp_path) == ["store"]
    assert os.listdir(tmp_path / "store") == ["precious"]


def test_mistakes_in_the_command_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert_refused(run(checkpoints["single"]), "required: store_dir", code=2)
    store = tmp_path / "store"
    result = run(checkpoints["single"], store, "--device", "tpu")
    assert_refused(result, "--device tpu: expected auto, cuda, cuda:INDEX or cpu", code=2)
    result = run(checkpoints["single"], store, "--method", "best")
    assert_refused(result, "invalid choice: 'best'", code=2)
    assert not store.exists()


def test_parent_that_is_a_file_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(run(checkpoints["single"], tmp_path / "file" / "store"), "cannot write in")


def test_no_room_is_refused(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with signals_restored():
        code = quantize.main([str(checkpoints["single"]), str(tmp_path / "store")])
    assert code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: no room on the disk: the store needs ")
    assert stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_is_an_error_of_one_line(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = run(checkpoints["single"], tmp_path / "store", preexec_fn=limit_files)
    assert_refused(result, "File too large; make room or choose another directory")
    assert os.listdir(tmp_path) == []


@contextmanager
def signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Success


def test_success_says_where_the_store_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    result = run(checkpoints["sharded"], tmp_path / "deep" / "store")
    store = Store.open(tmp_path / "deep" / "store")
    assert (result.returncode, result.stdout) == (0, "")
    assert str(store.path) in result.stderr
    assert store.fingerprint in result.stderr


def test_a_terminal_shows_a_bar(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    arguments = command(checkpoints["single"], tmp_path / "store")
    with subprocess.Popen(arguments, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:  # how Linux reports that the terminal's other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert b"quantizing:" in shown
    assert b"100%" in shown


# Killed


@contextmanager
def quantizing(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun a store in `path` / "store" and has a long way to go."""
    model = make_hollow_checkpoint(path / "large", intermediate_size=1 << 19)
    process = subprocess.Popen(
        command(model, path / "store", "--device", "cpu"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list(path.glob(".store.partial-*/weights-*")):
            assert process.poll() is None
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    with quantizing(tmp_path) as process:
        process.send_signal(number)
        stderr = process.communicate()[1]
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["large"]


def test_kill_leaves_no_store_and_the_next_run_cleans_up(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with quantizing(tmp_path) as process:
        process.kill()
        process.wait()
    assert sorted(os.listdir(tmp_path)) == [f".store.partial-{process.pid}", "large"]
    result = run(checkpoints["single"], tmp_path / "store")
    assert result.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["large", "store"]
    Store.open(tmp_path / "store")


# Memory


def peak_bytes(model: Path, store: Path) -> int:
    """Peak resident memory of a process that quantizes `model`."""
    # Not ru_maxrss: a child inherits the peak of the process that it was forked from.
    code = (
        "import sys; from feeder.quantize import main; code = main(sys.argv[1:]); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line]); "
        "sys.exit(code)"
    )
    arguments = [sys.executable, "-c", code, str(model), str(store), "--device", "cpu"]
    result = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout) * 1024


def test_memory_holds_pieces_not_tensors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = make_hollow_checkpoint(
        tmp_path / "model", hidden_size=512, intermediate_size=1 << 17, vocab_size=1 << 17
    )
    assert (model / "model.safetensors").stat().st_size > 1 << 30  # four tensors of 256 MiB
    base = peak_bytes(checkpoints["single"], tmp_path / "small")
    # One piece (32 MiB in fp32), one weight's codes (32 MiB), and what quantizing a chunk takes.
    assert peak_bytes(model, tmp_path / "store") - base < 150 << 20
