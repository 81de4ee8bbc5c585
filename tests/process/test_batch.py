"""Prompts and requests that share passes, in real processes: the same texts, one stream of weights."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from demo.sums import Sum
from engine.batch.batch import Batch
from engine.batch.passes import Passes
from engine.generate import Generator, Sampling
from engine.loop import Loop
from engine.shortage import MemoryKeeper
from engine.text import TokenIds
from tests import fed, lives
from tests.batching import Owner
from tests.processes import Room
from tests.serving import Serving

TASKS = [Sum("12.5", "7.25"), Sum("300", "41"), Sum("0.07", "9.9"), Sum("77.7", "88.8")]


def answers(room: Room, store: Path, source: Path, *flags: str) -> tuple[list[Any], Any]:
    """The records without what was measured, and the summary."""
    asked = ("--cache=20", f"--prompts={source}", "--max-new-tokens=25", "--json", *flags)
    ended = room.launch(f"--model={store}", *asked).wait()
    assert ended.code == 0, ended.err
    records = [json.loads(line) for line in ended.out.splitlines()]
    measured = ("seconds", "ttft_s")
    kept = [{k: v for k, v in record.items() if k not in measured} for record in records]
    (summary,) = [json.loads(line) for line in ended.err.splitlines() if line.startswith("{")]
    return kept, summary


def test_prompts_of_a_file(room: Room, demo_store: Path, tmp_path: Path) -> None:
    source = tmp_path / "sums.jsonl"
    source.write_text("".join(json.dumps({"input": task.prompt}) + "\n" for task in TASKS))
    alone, one = answers(room, demo_store, source, "--batch=1", "--speculate=off")
    together, three = answers(room, demo_store, source, "--batch=3")
    assert together == alone
    for record, task in zip(together, TASKS, strict=True):
        assert task.working.startswith(record["output"])
    assert (three["batch"], three["passes"]) == (3, 50)  # three prompts, then the fourth
    # The first pass of each run streams what no slot held yet.
    assert one["streamed_bytes"] > 1.7 * three["streamed_bytes"]


@pytest.mark.parametrize("slots", ["packed", "dequantized"])
def test_requests_cost_one_stream(room: Room, long_store: Path, slots: str) -> None:
    """Each weight is used once a pass, by all; the tokens are those of each alone."""
    flags = ("--cache=4", "--strategy=ring", f"--slots={slots}")
    with fed.model(room, long_store, *flags) as (model, engine):
        keeper = MemoryKeeper(model, engine.client, engine.memory)
        generator = Generator(
            model, TokenIds(320), Sampling(), True, Loop(None, keeper.survive), keeper.chunk
        )
        batch = Batch(model, Passes(model, None, keeper.survive), keeper, 8)
        asked = [
            ([7 * k + j for j in range(1 + 5 * k)], Sampling(max_new_tokens=10 + k, seed=k))
            for k in range(6)
        ]
        alone = [
            generator.answer(prompt, lambda text: None, sampling=how).ids for prompt, how in asked
        ]
        before = engine.client.stats.uses
        owners = [Owner(generator, *one) for one in asked]
        for owner in owners:
            batch.add(owner)
        while not batch.idle:
            batch.turn()
        assert [owner.ids for owner in owners] == alone
        assert batch.passes == max(map(len, alone)) == 15
        assert engine.client.stats.uses - before == batch.passes * len(engine.store.weights)


def test_a_feeder_replaced_under_load(room: Room, long_store: Path) -> None:
    """Requests of all kinds at once, and the feeder killed amid them: none is lost, none is wrong."""
    feeder = room.feeder(*lives.feeder_flags(long_store))
    most = 2 * lives.LONGEST - 10  # for one that nobody will wait for
    flags = ("serve", "--port=0", "--model-name=long", "--batch=6", f"--max-tokens={most}")
    serving = Serving.wait(room.start("-m", "engine", *flags))
    client = serving.client()
    asked: list[dict[str, Any]] = [
        {"prompt": "5 17 300 2", "temperature": 1, "seed": 3, "max_tokens": 24},
        {"prompt": "5 17 300 2", "temperature": 1, "seed": 4, "max_tokens": 24},
        {"prompt": "9", "temperature": 0, "max_tokens": 20},
        {"prompt": "1 2 3 4 5 6 7 8 9 10", "temperature": 0.8, "top_p": 0.9, "seed": 1, "max_tokens": 28},
        {"prompt": "44 3", "temperature": 1.5, "seed": 7, "max_tokens": 4},
        {"prompt": "44 3", "extra_body": {"repetition_penalty": 1.4}, "seed": 7, "max_tokens": 16},
        {"prompt": "12 12", "temperature": 1, "extra_body": {"top_k": 5}, "seed": 2, "max_tokens": 26},
        {"prompt": "300 200 100", "temperature": 1, "seed": 5, "max_tokens": 22, "stop": [" 1"]},
    ]  # fmt: skip

    def ask(fields: dict[str, Any]) -> tuple[str, str | None]:
        choice = client.completions.create(model="long", **fields).choices[0]
        return choice.text, choice.finish_reason

    def begin(fields: dict[str, Any]) -> tuple[Any, str]:
        """A stream, and the first piece of its text."""
        stream = client.completions.create(model="long", stream=True, **fields)
        return stream, next(stream).choices[0].text

    def rest(stream: Any, text: str) -> tuple[str, str | None]:
        for chunk in stream:
            text += chunk.choices[0].text
        return text, chunk.choices[0].finish_reason

    alone = [ask(fields) for fields in asked]
    stream, _ = begin({"prompt": "6 6", "temperature": 0, "max_tokens": most})
    begun = [begin(fields) for fields in asked[:4]]
    with ThreadPoolExecutor(len(asked)) as pool:
        futures = [pool.submit(ask, fields) for fields in asked[4:]]
        feeder.signal(signal.SIGKILL)
        feeder.popen.wait()
        successor = room.feeder(*lives.feeder_flags(long_store, 2, "resident"))
        together = [rest(*one) for one in begun] + [future.result() for future in futures]
    stream.close()
    assert together == alone
    serving.process.until_said(f"feeder {successor.pid} takes over")
    serving.until_metric("running_requests", 0)
    assert serving.metric("abandoned_requests_total") == 1
