"""The page of meters in a real browser, and the view of the same on a terminal."""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.browsers import browser
from tests.processes import PATIENCE_S, Room, until
from tests.serving import KEY, Serving

CACHE = 20  # of the demo model's 57 weights


@pytest.fixture(scope="module")
def place(demo_store: Path) -> Iterator[tuple[Room, Serving]]:
    with processes.room() as room:
        flags = ("--port=0", f"--api-key={KEY}", f"--model={demo_store}", f"--cache={CACHE}")
        process = room.launch("serve", *flags)
        yield room, Serving.wait(process)
        assert process.stop().code == 143


def text_of(page: Any, id: str) -> str:
    return str(page.execute_script("return document.getElementById(arguments[0]).textContent", id))


def until_shown(page: Any, id: str, expected: str) -> None:
    until(lambda: expected in text_of(page, id), lambda: f"{id}: {text_of(page, id)!r}")


def swap(serving: Serving, wish: object, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and reply of a swap that is ordered as a program would."""
    all_headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"http://127.0.0.1:{serving.port}/meters/swap"
    request = urllib.request.Request(url, json.dumps(wish).encode(), all_headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_page(place: tuple[Room, Serving], tmp_path: Path) -> None:
    _, serving = place
    asked = {"model": "store", "prompt": "1.1+2.3=?", "max_tokens": 60}
    client = serving.client()
    with browser(tmp_path / "profile") as page:
        page.set_window_size(1200, 900)
        page.get(f"http://127.0.0.1:{serving.port}/")
        until_shown(page, "connection", "API key is missing")
        page.find_element("id", "key").send_keys(KEY)
        page.find_element("css selector", "#key-form button").click()
        until_shown(page, "connection", "live")
        until_shown(page, "model", "store")
        assert len(page.find_elements("css selector", "#map i:not(.none)")) == 57
        assert len(page.find_elements("css selector", "#map .row")) == 8

        def all_there() -> bool:
            resident = int(text_of(page, "count-resident"))
            squares = len(page.find_elements("css selector", "#map i.s"))
            return 0 < resident < CACHE and squares == resident

        until(all_there, lambda: "as many squares as the count says")
        before = int(text_of(page, "tokens").split()[0])
        client.completions.create(**asked)  # type: ignore[call-overload]
        until_shown(page, "tokens", f"{before + 60} tokens")
        until_shown(page, "replies", "1 begun, 0 refused")
        # The strategy is another one, from here; the next text is as it was.
        page.find_element("css selector", "#strategy option[value=ring]").click()
        page.find_element("id", "cache").send_keys("-1")
        page.find_element("css selector", "#swap button").click()
        until_shown(page, "swapped", "strategy ring, all 57 weights")
        until_shown(page, "strategy-now", "now ring, cache -1")
        page.find_element("id", "cache").clear()
        page.find_element("id", "cache").send_keys("a lot")
        page.find_element("css selector", "#swap button").click()
        until_shown(page, "swapped", "cache 'a lot' is not understood")
        page.set_window_size(500, 900)  # the narrowest window; a phone is narrower still
        size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360
        # Nothing failed, and nothing was refused by the page's own policy, but the key and the cache.
        complaints = [line["message"] for line in page.get_log("browser")]
        assert all("401" in line or "400" in line for line in complaints), complaints


def test_who_may_swap(place: tuple[Room, Serving]) -> None:
    _, serving = place
    good = {"strategy": "resident", "cache": "21"}
    here = f"http://127.0.0.1:{serving.port}"
    assert swap(serving, good, Origin="http://elsewhere.example")[0] == 403
    assert swap(serving, good, Origin="null")[0] == 403
    assert swap(serving, good, Sec_Fetch_Site="cross-site")[0] == 403
    assert swap(serving, good, Content_Type="text/plain")[0] == 415
    assert swap(serving, good, Authorization="Bearer wrong")[0] == 401
    for wish, message in (
        ({"strategy": "/tmp/x.py:X"}, "expected one of ring, resident, on-demand"),
        ({"strategy": 5}, "expected texts"),
        ({"slots": "round"}, "slots 'round' found"),
        ({"cache": "nan"}, "is not understood"),
        ({"more": ""}, "expected a JSON object with"),
        ([], "expected a JSON object with"),
    ):
        status, said = swap(serving, wish)
        assert status == 400 and message in said["error"]["message"]
    status, said = swap(serving, good, Origin=here, Sec_Fetch_Site="same-origin")
    assert status == 200 and said["text"].startswith("strategy resident, 21 weights")


def test_the_files_take_no_key_and_no_other_page(place: tuple[Room, Serving]) -> None:
    _, serving = place
    for path in ("/", "/meters.css", "/meters.js"):
        reply = serving.raw("GET", path)
        policy = reply.headers["content-security-policy"]
        assert reply.status == 200 and policy.startswith("default-src 'none'")
        text = reply.read().decode()
        assert "http://" not in text and "https://" not in text  # nothing from elsewhere
    assert serving.raw("GET", "/meters/now").status == 401
    assert serving.raw("GET", "/meters/model").status == 401


def test_the_terminals_view(place: tuple[Room, Serving]) -> None:
    room, serving = place
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            fields: Any = {"model": "store", "prompt": "1.1+2.3=?", "max_tokens": 30}
            serving.client().completions.create(**fields)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        watch = room.start("-m", "feeder", "status", "--watch")
        watch.until(lambda: watch.out.count("passes over the model") >= 1, "looks twice")
        watch.ctrl_c()
        assert watch.wait().code == 130
    finally:
        done.set()
        thread.join()
    assert "\x1b" not in watch.out  # no terminal
    assert "q_proj    " in watch.out and " waited for " in watch.out
    assert " of " in next(line for line in watch.out.splitlines() if line.startswith("link use"))
    status = json.loads(room.start("-m", "feeder", "status", "--json").wait().out)
    assert len(status["weight_states"]) == status["weights"] == 57
    assert status["weight_states"].count("s") == status["standing"]
    assert os.path.isdir(status["store"])
