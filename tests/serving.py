"""A server that runs, and what its clients see of it."""

from __future__ import annotations

import http.client
import re
import urllib.request
from dataclasses import dataclass

from openai import OpenAI

from tests.processes import PATIENCE_S, Process, until

KEY = "a-key-of-the-tests"


@dataclass(frozen=True)
class Serving:
    """``port`` is one that the system chose."""

    process: Process
    port: int

    @classmethod
    def wait(cls, process: Process) -> Serving:
        """The server of a process, as soon as it is ready."""
        process.until_said("serving model")
        found = re.search(r"serving model \S+ on http://127\.0\.0\.1:(\d+)/v1", process.err)
        assert found is not None, process.err
        return cls(process, int(found[1]))

    def client(self, key: str = KEY) -> OpenAI:
        """The official client, which is not to try again what fails."""
        url = f"http://127.0.0.1:{self.port}/v1"
        return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE_S)

    def get(self, path: str) -> str:
        """What stands at a path."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return str(reply.read().decode())

    def raw(self, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
        """The reply to headers alone."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.putrequest(method, path, skip_host="host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        return connection.getresponse()

    def metric(self, name: str) -> float:
        """One figure of /metrics."""
        found = re.search(rf"^weight_feeder_{re.escape(name)} (\S+)$", self.get("/metrics"), re.M)
        assert found is not None, name
        return float(found[1])

    def until_metric(self, name: str, value: float) -> None:
        """Wait for a figure to become ``value``."""
        until(lambda: self.metric(name) == value, lambda: f"{name} is {self.metric(name)}")
