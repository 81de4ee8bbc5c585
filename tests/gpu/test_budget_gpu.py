"""The budget on a GPU: both processes stay within --vram, and go on when memory runs out for real."""

from __future__ import annotations

import contextlib
import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.memory import memory_for
from common.store import Store
from engine.embedding import host_table
from engine.generate import Generator, Sampling
from engine.loop import Loop
from engine.shortage import MemoryKeeper
from engine.text import codec_for
from feeder.random_store import make_random_store
from tests import fed
from tests.processes import Room

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 50_000,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
TABLE_BYTES = 50_000 * 2048 * 2
MB = 10**6
#: Dequantized, since all slots together are to be larger than what is asked of them.
CUDA = ("--device=cuda", "--slots=dequantized")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "store"
    make_random_store(CONFIG, path, progress=False)
    return path


def prompt(tokens: int) -> str:
    return " ".join(str(7919 * i % 50_000) for i in range(tokens))


# The embedding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_from_host_memory_are_those_of_a_table_on_the_device(dtype: torch.dtype) -> None:
    memory = memory_for("cuda")
    table = torch.randn(50_001, 1111, generator=torch.Generator().manual_seed(4)).bfloat16()
    before = torch.cuda.memory_allocated()
    found = host_table(table, dtype, memory)
    assert found.is_cuda and torch.cuda.memory_allocated() == before
    on_device = table.to("cuda", dtype)
    for shape in [(1, 1), (1, 7), (3, 500), (1, 4096)]:
        ids = torch.randint(50_001, shape, device="cuda")
        ids.view(-1)[-1] = 50_000
        expected = nn.functional.embedding(ids, on_device)
        assert torch.equal(nn.functional.embedding(ids, found), expected), shape


def test_a_captured_graph_looks_up_whatever_ids_it_finds() -> None:
    memory = memory_for("cuda")
    table = torch.randn(1000, 512, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = host_table(table, torch.bfloat16, memory)
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    nn.functional.embedding(ids, found)  # once before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row = nn.functional.embedding(ids, found)
    for index in (999, 0, 517):
        ids.fill_(index)
        graph.replay()
        assert torch.equal(row.cpu().view(-1), table[index])


def test_page_locked_memory_goes_back_with_the_last_view() -> None:
    memory = memory_for("cuda")
    host = torch.arange(1 << 20, dtype=torch.int32)
    view = memory.device_view(host)
    assert host.is_pinned()
    row = view[5:7]
    del view
    gc.collect()
    assert host.is_pinned() and row.tolist() == [5, 6]
    del row
    gc.collect()
    assert not host.is_pinned()


def test_the_engine_leaves_the_table_in_host_memory(room: Room, store: Path) -> None:
    with fed.engine(room, store, *CUDA, "--cache=4") as engine:
        before = torch.cuda.memory_allocated()  # what the test compares with is there already
        model = fed.build(engine)
        assert model.model.embed_tokens.weight.is_cuda
        assert torch.cuda.memory_allocated() - before < TABLE_BYTES // 10


# The budget -------------------------------------------------------------------------------------


def by_process() -> str:
    """What the driver says each process has on the device, contexts included."""
    command = ["nvidia-smi", "--query-compute-apps=pid,name,used_memory", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        return f"nvidia-smi: {error}"


@pytest.mark.parametrize("vram", [2700, 3300])
def test_both_processes_together_stay_within_vram(room: Room, store: Path, vram: int) -> None:
    """Measured on the whole device: nobody else may use it meanwhile."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    run = room.launch(
        f"--model={store}", *CUDA, f"--vram={vram}MB", "--greedy",
        "--max-new-tokens=64", f"--prompt={prompt(3000)}",
    )  # fmt: skip
    most, told = 0, ""
    while run.popen.poll() is None:
        now = before - torch.cuda.mem_get_info()[0]
        if now > max(most, vram * MB):
            told = by_process()  # whose it is that was not counted
        most = max(most, now)
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert len(ended.out.split()) == 64
    assert "slots shrink" not in ended.err and "at a time" not in ended.err
    print(f"--vram={vram}MB: {most / MB:.0f} MB at the most")
    assert 0.6 * vram * MB < most <= vram * MB, f"{told}\n{ended.err}"


def test_too_little_is_one_line(room: Room, store: Path) -> None:
    ended = room.launch(f"--model={store}", *CUDA, "--vram=1200MB", "--prompt=1").wait()
    assert ended.code == 1
    assert ended.last_line.startswith("error: feeder: --vram gives 1.2 GB and a run needs at least")
    assert "contexts 1.34 GB" in ended.last_line and "staging" in ended.last_line


def test_a_prompt_as_long_as_planned_fits_beside_packed_slots(room: Room, store: Path) -> None:
    """What the engine allocates with its first long pass is not to be missing then."""
    ended = room.launch(
        f"--model={store}", "--device=cuda", "--slots=packed", "--vram=2500MB",
        "--context=8100", "--greedy", "--max-new-tokens=16", f"--prompt={prompt(8000)}",
    ).wait()  # fmt: skip
    assert ended.code == 0, ended.err
    assert len(ended.out.split()) == 16
    assert "slots shrink" not in ended.err


def test_a_prompt_longer_than_planned_goes_on(room: Room, store: Path) -> None:
    ended = room.launch(
        f"--model={store}", *CUDA, "--vram=3GB", "--context=64", "--greedy",
        "--max-new-tokens=16", f"--prompt={prompt(12_000)}",
    ).wait()  # fmt: skip
    assert ended.code == 0, ended.err
    assert len(ended.out.split()) == 16
    assert "slots shrink" in ended.err


# Running out ------------------------------------------------------------------------------------


@contextlib.contextmanager
def filled_up_at(module: nn.Module, call: int) -> Iterator[list[torch.Tensor]]:
    """At that call of ``module`` all memory that torch can have is taken by something else."""
    taken: list[torch.Tensor] = []
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)
        size = 1 << 32
        while len(calls) == call + 1 and size >= 512:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2

    handle = module.register_forward_pre_hook(hook)
    try:
        yield taken
    finally:
        handle.remove()


@pytest.mark.parametrize(("call", "tokens"), [(0, 4000), (0, 40), (7, 3000)])
def test_memory_that_runs_out_comes_from_slots(
    room: Room, store: Path, call: int, tokens: int
) -> None:
    """In the prompt and while it decodes; the text is that of an engine that had enough."""

    def generate(model: Any, engine: fed.Engine) -> list[int]:
        keeper = MemoryKeeper(model, engine.client, engine.memory)
        codec = codec_for(Store.open(store))
        sampling = Sampling(max_new_tokens=16, temperature=1.0, seed=3)
        loop = Loop(None, keeper.survive)
        generator = Generator(model, codec, sampling, True, loop)  # never splits a prompt
        return generator.answer(prompt(tokens), lambda _: None).ids

    memory = memory_for("cuda")
    try:
        with fed.model(room, store, *CUDA, "--cache=-1") as (model, engine):
            expected = generate(model, engine)
            feeder = engine.feeder
            del model, engine
        feeder.stop()
        gc.collect()
        torch.cuda.empty_cache()
        flags = (*CUDA, "--vram=4GB", "--context=64")
        with fed.model(room, store, *flags) as (model, engine):
            before = engine.client.ask_status()["arena_bytes"]
            with filled_up_at(model.model.layers[5].mlp, call) as taken:
                found = generate(model, engine)
            assert taken
            after = engine.client.ask_status()["arena_bytes"]
            assert after <= before - (512 << 20)
            assert "slots shrink" in engine.feeder.err
            assert found == expected
            taken.clear()
            del model, engine
    finally:
        memory.limit(0)  # of this very process
        gc.collect()
        torch.cuda.empty_cache()
