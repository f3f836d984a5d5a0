"""The part of the Prefect API that records need, behind Prefect's own client, with faults of its own.

Only the server's side is simulated: requests are made, resent and judged by the real client. That its answers are the
real server's is checked in `test_simulation.py`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import ssl
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient

__all__ = ["PREFECT_FAULTS", "Change", "SimPrefect"]

PREFECT_FAULTS = ("refused", "500", "503", "lost", "500-after", "timeout")
"""What can become of one request: not connected; 500 or 503 instead of the work; done and the connection lost; done and
answered 500; nothing done and no answer."""

_UNVERIFIED = ssl.create_default_context()  # made once: it takes 20 ms, and nothing leaves this process


@dataclass(frozen=True)
class Change:
    """A record as it was written, and when."""

    at: float
    name: str
    value: Mapping[str, Any]


@dataclass
class SimPrefect:
    """Variables and flow runs.

    Args:
        faults: By the number of the request, from 1.
        outages: Spans of time, in seconds from the beginning, during which nobody is at home.
        latency: Seconds that a request takes to arrive, and its answer to come back; called for each.
    """

    latency: Callable[[], float]
    faults: Mapping[int, str] = field(default_factory=dict[int, str])
    outages: Iterable[tuple[float, float]] = ()
    variables: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    flow_runs: dict[str, str] = field(default_factory=dict[str, str])
    changes: list[Change] = field(default_factory=list[Change])
    requests: int = 0
    fired: list[str] = field(default_factory=list[str])
    closed: bool = False

    def client(self, **_: Any) -> PrefectClient:
        """Return a client of it, in place of `get_client()`."""
        settings: dict[str, Any] = {"transport": _Transport(self), "verify": _UNVERIFIED}
        return PrefectClient("http://prefect.test/api", httpx_settings=settings)

    def heal(self) -> None:
        """From now on, do everything right."""
        self.faults, self.outages = {}, ()

    def records(self, run_key: str) -> list[dict[str, Any]]:
        """Return the attempts at a run key, as they stand."""
        values = [one["value"] for one in self.variables.values() if one["value"].get("run_key") == run_key]
        return sorted(values, key=lambda value: value["attempt"])

    async def take(self, request: httpx.Request) -> httpx.Response:
        """Do what a request asks for, well or badly."""
        if self.closed:
            raise httpx.ConnectError("The world is over", request=request)
        self.requests += 1
        number = self.requests
        fault = self.faults.get(number)
        now = asyncio.get_running_loop().time()
        if any(start <= now < end for start, end in self.outages):
            fault = "refused"
        if fault:
            self.fired.append(f"{fault} at request {number} ({request.method} {request.url.path})")
        if fault == "refused":
            raise httpx.ConnectError("Connection refused", request=request)
        await asyncio.sleep(self.latency())
        if fault == "timeout":
            await asyncio.sleep(60)
            raise httpx.ReadTimeout("The read operation timed out", request=request)
        if fault in ("500", "503"):
            return httpx.Response(int(fault), json={"detail": "asked for"}, request=request)
        answer = self.do(request.method, request.url.path.removeprefix("/api"), request.content)
        answer.request = request
        await asyncio.sleep(self.latency())
        if fault == "lost":
            raise httpx.ReadError("Connection reset by peer", request=request)
        if fault == "500-after":
            return httpx.Response(500, json={"detail": "asked for"}, request=request)
        return answer

    def do(self, method: str, path: str, content: bytes) -> httpx.Response:
        """Carry a request out, at one moment."""
        body: Any = json.loads(content) if content else None
        parts = path.strip("/").split("/")
        if parts == ["csrf-token"]:
            return httpx.Response(422, json={"detail": "CSRF protection is disabled."})
        if parts[0] == "flow_runs":
            return self._flow_run(method, parts[1], body)
        if parts == ["variables", "filter"]:
            return httpx.Response(200, json=self._filter(body))
        if parts == ["variables"] and method == "POST":
            if body["name"] in self.variables:
                return httpx.Response(409, json={"detail": "A variable with this name already exists."})
            self.variables[body["name"]] = {"id": str(uuid.uuid4()), **body}
            self._note(body["name"])
            return httpx.Response(201, json=self.variables[body["name"]])
        return self._named(method, parts[2], body)

    def _named(self, method: str, name: str, body: Any) -> httpx.Response:
        if name not in self.variables:
            return httpx.Response(404, json={"detail": "Variable not found."})
        if method == "DELETE":
            del self.variables[name]
            return httpx.Response(204)
        if method == "PATCH":
            self.variables[name].update(body)
            self._note(name)
            return httpx.Response(204)
        return httpx.Response(200, json=self.variables[name])

    def _note(self, name: str) -> None:
        value = self.variables[name]["value"]
        if isinstance(value, dict) and "run_key" in value:
            self.changes.append(Change(asyncio.get_running_loop().time(), name, dict(value)))

    def _filter(self, body: Any) -> list[dict[str, Any]]:
        wanted = body["variables"]
        like, tags = wanted.get("name", {}).get("like_"), wanted.get("tags", {}).get("all_", [])
        found = [
            one
            for name, one in sorted(self.variables.items())
            if (like is None or fnmatch.fnmatchcase(name, like.replace("%", "*").replace("_", "?")))
            and set(tags) <= set(one["tags"])
        ]
        return found[body["offset"] : body["offset"] + body["limit"]]

    def _flow_run(self, method: str, run_id: str, body: Any) -> httpx.Response:
        if run_id not in self.flow_runs:
            return httpx.Response(404, json={"detail": "Flow run not found"})
        if method == "POST":
            self.flow_runs[run_id] = body["state"]["type"]
            state = {"type": self.flow_runs[run_id], "name": self.flow_runs[run_id].title()}
            return httpx.Response(201, json={"state": state, "status": "ACCEPT", "details": {"type": "accept_details"}})
        state = {"type": self.flow_runs[run_id], "name": self.flow_runs[run_id].title()}
        return httpx.Response(200, json={"id": run_id, "flow_id": run_id, "name": "simulated", "state": state})


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, server: SimPrefect) -> None:
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[httpx.Response] = loop.create_future()

        async def serve() -> None:
            try:
                response = await self._server.take(request)
            except Exception as error:
                if not answer.done():
                    answer.set_exception(error)
                    answer.exception()  # a client that was killed never asks
            else:
                if not answer.done():
                    answer.set_result(response)

        # On the server's side: it goes on when the client that asked is killed.
        loop.call_soon_threadsafe(_spawn, loop, serve)
        return await answer


def _spawn(loop: asyncio.AbstractEventLoop, serve: Any) -> None:
    task = loop.create_task(serve())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
