"""The part of the Prefect API that records need, behind Prefect's own client, with faults of its own.

Only the server's side is simulated: requests are made, resent and judged by the real client. That its answers are the
real server's is checked in `test_simulation.py`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import ssl
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient

from proof.sim.loop import Process, current_process
from support.records import stored_records

__all__ = ["API", "PREFECT_FAULTS", "Change", "SimPrefect"]

PREFECT_FAULTS = ("refused", "500", "503", "lost", "500-after", "timeout", "slow", "late", "twice")
"""What can become of one request: not connected; 500 or 503 instead of the work; done and the connection lost; done and
answered 500; nothing done and no answer; done and answered after `SLOW` seconds; no answer, and done after `LATE`;
done and answered, and done once more after `LATE`."""
API = "http://prefect.test/api"
SLOW = 40.0
LATE = 90.0
NO_ANSWER = 60.0
"""Seconds after which a connection is given up that brings no answer."""
TWICE = 0.02
"""Seconds within which a second DELETE is answered like the first one, as PostgreSQL has been seen to do."""

_UNVERIFIED = ssl.create_default_context()  # made once: it takes 20 ms, and nothing leaves this process

_KINDS = {"flow_runs": 0, "task_runs": 1 << 90}
"""What makes of the id of a flow run that of its task run in the parent, or of its flow."""
Variable = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """An attempt as it stands from some moment on, None once it is gone, and as it stood until then.

    `by` is the process whose request changed it, None if it is nobody's.
    """

    at: float
    name: str
    value: Mapping[str, Any] | None
    before: Mapping[str, Any] | None = None
    by: Process | None = None


class FlowRuns(dict[str, str]):
    """The states of flow runs by their ids, and when each came into which: None is its deletion."""

    def __init__(self, wall: Callable[[], float]) -> None:
        super().__init__()
        self.wall = wall
        self.history: dict[str, list[tuple[float, str | None]]] = {}

    def __setitem__(self, run_id: str, state: str) -> None:
        super().__setitem__(run_id, state)
        self.history.setdefault(run_id, []).append((self.wall(), state))

    def __delitem__(self, run_id: str) -> None:
        super().__delitem__(run_id)
        self.history[run_id].append((self.wall(), None))


@dataclass
class SimPrefect:
    """Variables, concurrency limits and flow runs.

    Args:
        latency: Seconds that a request takes to arrive, and its answer to come back; called for each.
        wall: The server's clock, in seconds since 1970.
        faults: By the number of the request, from 1; as `write@3` by that of the change of a Variable, as `delete@1`
            by that of its deletion, as `read@2` by that of the reading of Variables.
        outages: Spans of time, in seconds from the beginning, during which nobody is at home.
        read: What the Variables say about attempts, as this package's record store reads them.

    Attributes:
        parents: The flow run that a flow run is a subflow of.
        changes: What became of each attempt, in order.
        asked: Who made each request, and when; None is nobody's process.
    """

    latency: Callable[[], float]
    wall: Callable[[], float] = time.time
    faults: Mapping[int | str, str] = field(default_factory=dict[int | str, str])
    outages: Iterable[tuple[float, float]] = ()
    read: Callable[[Iterable[Variable]], list[dict[str, Any]]] = stored_records
    variables: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    counters: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    flow_runs: FlowRuns = field(init=False)
    parents: dict[str, str] = field(default_factory=dict[str, str])
    run_counts: dict[str, int] = field(default_factory=dict[str, int])
    changes: list[Change] = field(default_factory=list[Change])
    asked: list[tuple[float, Process | None]] = field(default_factory=list[tuple[float, "Process | None"]])
    requests: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    fired: list[str] = field(default_factory=list[str])
    closed: bool = False
    _stored: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    _deleted: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        self.flow_runs = FlowRuns(self.wall)

    def client(self, **_: Any) -> PrefectClient:
        """Return a client of it, in place of `get_client()`."""
        settings: dict[str, Any] = {"transport": _Transport(self), "verify": _UNVERIFIED}
        return PrefectClient(API, httpx_settings=settings)

    def heal(self) -> None:
        """From now on, do everything right."""
        self.faults, self.outages = {}, ()

    def records(self, idempotency_key: str) -> list[dict[str, Any]]:
        """Return the attempts at an idempotency key, as they stand."""
        values = [value for value in self.read(self.variables.values()) if value["idempotency_key"] == idempotency_key]
        return sorted(values, key=lambda value: value["attempt"])

    def gone(self, idempotency_key: str) -> list[Mapping[str, Any]]:
        """Return the attempts at an idempotency key that were pruned, as they stood then.

        Those are left out that a call withdrew.
        """
        pruned = [change for change in self.changes if change.by is None or change.by.facts["call"] is None]
        deleted = [change.before for change in pruned if change.value is None and change.before is not None]
        return [value for value in deleted if value["idempotency_key"] == idempotency_key]

    async def take(self, request: httpx.Request, by: Process | None) -> httpx.Response:
        """Do what a request asks for, well or badly."""
        if self.closed:
            raise httpx.ConnectError("The world is over", request=request)
        loop = asyncio.get_running_loop()
        self.requests += 1
        path = request.url.path.removeprefix("/api")
        # A client of Prefect's asks for a token once, before its first change: that is not a request of ours.
        self.asked += [(loop.time(), by)] * (path != "/csrf-token")
        fault = self.faults.get(self.requests)
        for kind in _kinds_of(request.method, path):
            self.counts[kind] += 1
            fault = fault or self.faults.get(f"{kind}@{self.counts[kind]}")
        if any(start <= loop.time() < end for start, end in self.outages):
            fault = "refused"
        if fault:
            self.fired.append(f"{fault} at request {self.requests} ({request.method} {request.url.path})")
        if fault == "refused":
            raise httpx.ConnectError("Connection refused", request=request)
        await asyncio.sleep(self.latency())
        if fault in ("late", "twice"):
            loop.call_later(LATE, lambda: self.closed or self.do(request.method, path, request.content, by))
        if fault in ("timeout", "late"):
            await asyncio.sleep(NO_ANSWER)
            raise httpx.ReadTimeout("The read operation timed out", request=request)
        if fault in ("500", "503"):
            return self._answer(int(fault), {"detail": "asked for"}, request)
        if fault == "slow":
            await asyncio.sleep(SLOW)
        status, body = self.do(request.method, path, request.content, by)
        answer = self._answer(status, body, request)
        await asyncio.sleep(self.latency())
        if fault == "lost":
            raise httpx.ReadError("Connection reset by peer", request=request)
        if fault == "500-after":
            return self._answer(500, {"detail": "asked for"}, request)
        return answer

    def _answer(self, status: int, body: Any, request: httpx.Request) -> httpx.Response:
        # uvicorn writes the date down once a second, so that it may be a second old.
        headers = {"Date": formatdate(int(self.wall() - 0.9), usegmt=True)}
        if body is None:
            return httpx.Response(status, headers=headers, request=request)
        return httpx.Response(status, headers=headers, json=body, request=request)

    def do(self, method: str, path: str, content: bytes, by: Process | None = None) -> tuple[int, Any]:
        """Carry a request out, at one moment; return the status and body of the answer."""
        body: Any = json.loads(content) if content else None
        parts = path.strip("/").split("/")
        if parts == ["csrf-token"]:
            return 422, {"detail": "CSRF protection is disabled."}
        if parts == ["events", "filter"]:
            return 200, {"events": [], "total": 0, "next_page": None}  # no flow run sends heartbeats
        if parts == ["block_documents", "filter"]:
            return 200, []  # no Flow has asked anything by webhook
        if parts[:2] == ["v2", "concurrency_limits"]:
            return self._counter(method, parts[2:], body)
        if parts in (["flow_runs", "filter"], ["task_runs", "filter"]):
            (ids,) = [one["id"]["any_"] for one in body.values() if isinstance(one, dict)]
            found = [self._found(parts[0], one) for one in ids]
            return 200, [one for one in found if one is not None][: body["limit"]]
        if parts[0] == "flow_runs":
            return self._flow_run(method, parts[1], body)
        if parts == ["variables", "filter"]:
            return 200, self._filter(body)
        if parts == ["variables", "count"]:
            return 200, len(self.variables)
        if parts == ["variables"] and method == "POST":
            if body["name"] in self.variables:
                return 409, {"detail": f"A variable with the name {body['name']!r} already exists."}
            now = self._now()
            self.variables[body["name"]] = {"id": str(uuid.uuid4()), "created": now, "updated": now, "tags": [], **body}
            self._note(by)
            return 201, self.variables[body["name"]]
        return self._one(method, parts[1:], body, by)

    def _now(self) -> str:
        return datetime.fromtimestamp(self.wall(), UTC).isoformat().replace("+00:00", "Z")

    def _one(self, method: str, place: list[str], body: Any, by: Process | None) -> tuple[int, Any]:
        """Read, change or delete the Variable at `name/NAME` or at its id."""
        if place[0] == "name":
            found = self.variables.get(place[1])
        else:
            found = next((one for one in self.variables.values() if one["id"] == place[0]), None)
        now = asyncio.get_running_loop().time()
        if found is None:
            if method == "DELETE" and now - self._deleted.get("/".join(place), -TWICE) < TWICE:
                return 204, None
            return 404, {"detail": "Variable not found."}
        if method == "DELETE":
            del self.variables[found["name"]]
            self._deleted[f"name/{found['name']}"] = self._deleted[found["id"]] = now
            self._note(by)
            return 204, None
        if method == "PATCH":
            found.update(body, updated=self._now())
            self._note(by)
            return 204, None
        return 200, found

    def _counter(self, method: str, place: list[str], body: Any) -> tuple[int, Any]:
        """Create, read or change a concurrency limit, or the slots that are taken of one."""
        if not place:
            if body["name"] in self.counters:
                return 409, {"detail": "exists"}
            now = {"created": self._now(), "updated": self._now()}
            made = {"id": str(uuid.uuid4()), "active": True, "active_slots": 0, "slot_decay_per_second": 0.0, **now}
            self.counters[body["name"]] = {**made, **body}
            return 201, self.counters[body["name"]]
        if place == ["filter"]:
            return 200, [*self.counters.values()][body["offset"] :]
        found = self.counters.get(body["names"][0] if method == "POST" else place[0])
        if method != "POST":
            if found is None:
                return 404, {"detail": "Concurrency Limit not found"}
            found.update(body or {}, updated=self._now())
            return (200, found) if method == "GET" else (204, None)
        if found is None:
            return 200, []
        slots = found["active_slots"] + (body["slots"] if place == ["increment"] else -body["slots"])
        if slots > found["limit"]:
            return 423, {"detail": "Locked"}
        found["active_slots"] = max(0, slots)
        return 200, [{name: found[name] for name in ("id", "name", "limit")}]

    def _note(self, by: Process | None) -> None:
        """Note what has become of attempts."""
        now = asyncio.get_running_loop().time()
        stored: dict[str, Mapping[str, Any]] = {}
        for value in self.read(self.variables.values()):
            stored[f"{value['idempotency_key']}/{value['attempt']}"] = value
        for name in {**self._stored, **stored}:
            if (before := self._stored.get(name)) != (value := stored.get(name)):
                self.changes.append(Change(now, name, value, before, by))
        self._stored = stored

    def _filter(self, body: Any) -> list[dict[str, Any]]:
        wanted = body.get("variables") or {}
        some = any if wanted.get("operator") == "or_" else all
        found = [one for _, one in sorted(self.variables.items()) if some(_conditions(wanted, one))]
        if body.get("sort") == "UPDATED_DESC":
            found.sort(key=lambda one: datetime.fromisoformat(one["updated"]), reverse=True)
        return found[body["offset"] : body["offset"] + body["limit"]]

    def _found(self, kind: str, id_: str) -> dict[str, Any] | None:
        """Return a flow run, or the task run that a subflow is in its parent."""
        run_id = str(uuid.UUID(int=uuid.UUID(id_).int ^ _KINDS[kind]))
        if run_id not in self.flow_runs:
            return None
        at, state = self.flow_runs.history[run_id][-1]
        updated = datetime.fromtimestamp(at, UTC).isoformat()
        # With its parent goes the task run, and the subflow is a root.
        parent = self.parents.get(run_id)
        parent = parent if parent in self.flow_runs else None
        if kind == "task_runs":
            return None if parent is None else {"id": id_, "updated": updated, "flow_run_id": parent}
        task = str(uuid.UUID(int=uuid.UUID(id_).int ^ _KINDS["task_runs"]))
        return {
            "id": id_,
            "updated": updated,
            "state_type": state,
            "parent_task_run_id": None if parent is None else task,
        }

    def _flow_run(self, method: str, run_id: str, body: Any) -> tuple[int, Any]:
        if run_id not in self.flow_runs:
            return 404, {"detail": "Flow run not found"}
        if method == "POST":
            self.flow_runs[run_id] = body["state"]["type"]
            state = {"type": self.flow_runs[run_id], "name": self.flow_runs[run_id].title()}
            return 201, {"state": state, "status": "ACCEPT", "details": {"type": "accept_details"}}
        state = {"type": self.flow_runs[run_id], "name": self.flow_runs[run_id].title()}
        count = self.run_counts.get(run_id, 0)
        return 200, {"id": run_id, "flow_id": run_id, "name": "simulated", "state": state, "run_count": count}


def _kinds_of(method: str, path: str) -> Iterator[str]:
    """Yield by which counts a fault may name a request."""
    if path == "/variables/filter":
        yield "read"
    elif path.startswith("/variables") and path != "/variables/count" and method != "GET":
        yield "write"
        if method == "DELETE":
            yield "delete"


def _conditions(wanted: Mapping[str, Any], one: Variable) -> Iterator[bool]:
    """Yield whether a Variable meets each condition of a filter."""
    name, tags = wanted.get("name") or {}, wanted.get("tags") or {}
    for what in ("id", "name"):
        if (among := (wanted.get(what) or {}).get("any_")) is not None:
            yield one[what] in among
    if like := name.get("like_"):
        # Anywhere in the name, of either case; `_` is any one character.
        yield fnmatch.fnmatchcase(one["name"].lower(), f"*{like.lower()}*".replace("%", "*").replace("_", "?"))
    if (all_ := tags.get("all_")) is not None:
        yield set(all_) <= set(one["tags"])
    if not any(wanted.get(what) for what in ("id", "name", "tags")):
        yield True


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, server: SimPrefect) -> None:
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[httpx.Response] = loop.create_future()
        by = current_process()

        async def serve() -> None:
            try:
                response = await self._server.take(request, by)
            except Exception as error:
                if not answer.done():
                    answer.set_exception(error)
                    answer.exception()  # a client that was killed never asks
            else:
                if not answer.done():
                    answer.set_result(response)

        # On the server's side: it goes on when the client that asked is killed.
        loop.call_soon_threadsafe(_spawn, loop, serve)
        done, _ = await asyncio.wait({answer}, timeout=request.extensions.get("timeout", {}).get("read"))
        if not done:
            raise httpx.ReadTimeout("The read operation timed out", request=request)
        return answer.result()


def _spawn(loop: asyncio.AbstractEventLoop, serve: Any) -> None:
    task = loop.create_task(serve())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
