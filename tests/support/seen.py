"""What a Prefect server holds, read over its HTTP API, the way anyone could read it."""

import uuid
from collections.abc import Mapping
from typing import Any

import httpx

from support.prefect_server import PrefectServer, drain
from support.waiting import wait_until


class Seen:
    """Reads a server. Each method asks it anew; none may be called on a running event loop."""

    def __init__(self, server: PrefectServer) -> None:
        self._client = httpx.Client(base_url=server.api_url, timeout=30, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self.call("POST", path, body)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of a request; None where the answer is empty."""

        def taken() -> httpx.Response | None:
            answer = self._client.request(method, path, json=body)
            # SQLite was locked for too long: nothing was done, and Prefect's own client asks again as well.
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

        answer = wait_until(taken, f"{method} {path}", pause=0.1)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def _pages(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all that a filter finds: the server gives 200 at once."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.post(path, {**body, "limit": 200, "offset": len(found)})
            found += page
            if len(page) < 200:
                return found

    def flow_run(self, flow_run_id: Any) -> dict[str, Any]:
        return self.get(f"/flow_runs/{flow_run_id}")

    def flow_runs(self, name: str) -> list[dict[str, Any]]:
        return self._pages("/flow_runs/filter", {"flows": {"name": {"any_": [name]}}, "sort": "START_TIME_ASC"})

    def subflow_runs(self, flow_run_id: Any) -> list[dict[str, Any]]:
        return self.post("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [str(flow_run_id)]}}})

    def task_runs(self, flow_run_id: Any, *, count: int) -> list[dict[str, Any]]:
        """Return the task runs of a flow run, once `count` have ended: the server records them late."""

        def ended() -> list[dict[str, Any]] | None:
            found = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [str(flow_run_id)]}}})
            over = [run for run in found if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]
            return found if len(over) >= count else None

        return wait_until(ended, f"{count} task runs have ended", pause=0.1)

    def set_state(self, flow_run_id: Any, kind: str) -> None:
        self.post(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": kind}, "force": True})

    def variables(self, name_like: str = "crew_%") -> list[dict[str, Any]]:
        return self._pages("/variables/filter", {"variables": {"name": {"like_": name_like}}, "sort": "NAME_ASC"})

    def artifacts(self, key: str) -> list[dict[str, Any]]:
        return self.post("/artifacts/filter", {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"})[::-1]

    def logs(self, flow_run_id: Any) -> str:
        """Return what a flow run has logged, its tasks included: a line each, with the level."""
        drain()
        body = {"logs": {"flow_run_id": {"any_": [str(flow_run_id)]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        levels = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR"}
        lines = self.post("/logs/filter", body)
        return "\n".join(f"{levels.get(line['level'], line['level'])} {line['message']}" for line in lines)

    def events(self, name: str, kind: str = "run") -> list[dict[str, Any]]:
        """Return all events about a run, in order, once everything that was emitted so far has arrived."""
        self.resolve_events()
        return self._events(f"prefect-crew.{kind}.{name}")

    def resolve_events(self) -> None:
        """Wait until all that this process has emitted stands on the server."""
        from prefect.events import emit_event

        last = f"test.last-event.{uuid.uuid4()}"
        emit_event("test.last-event", resource={"prefect.resource.id": last})
        drain()
        wait_until(lambda: self._events(last), "the events arrive", pause=0.1)

    def _events(self, resource: str) -> list[dict[str, Any]]:
        body = {"filter": {"resource": {"id": [resource]}, "order": "ASC"}, "limit": 50}
        return self.post("/events/filter", body)["events"]
