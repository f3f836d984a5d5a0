"""The reviewed report: a person answers in the form of its flow run, as Prefect's page does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.runs.reviews import form
from support.deployed import ROOT, load_flow, wait_until
from support.seen import Seen

SaveCrew = Callable[..., CrewServer]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LOOK_EVERY", 0.2)


def test_the_draft_is_what_a_person_approved(save_crew: SaveCrew, seen: Seen) -> None:
    crews = {name: save_crew(name, str(ROOT / "flows" / "crews" / f"{name}.yaml")) for name in ("research", "draft")}
    outcome: list[Any] = []

    def run() -> None:
        import asyncio

        outcome.append(asyncio.run(load_flow("reviewed_report.py:reviewed_report")("oolong", idempotency_key="oolong")))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def paused() -> dict[str, Any] | None:
        runs = seen.post("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}})
        return next((one for one in runs if one["name"] == "reviewed report on oolong"), None)

    def answer(**fields: Any) -> str | None:
        """Submit the form that is up; None while its fields are not stored yet."""
        run = wait_until(paused, seconds=60, what="a form")
        accepted = seen.post(f"/flow_runs/{run['id']}/resume", {"run_input": fields})["status"] == "ACCEPT"
        return run["state"]["state_details"]["pause_key"] if accepted else None

    first = wait_until(lambda: answer(decision="reject", feedback="Shorter."), seconds=60, what="the rejection")
    wait_until(
        lambda: (run := paused()) and run["state"]["state_details"]["pause_key"] != first, seconds=60, what="round two"
    )
    wait_until(lambda: answer(decision="approve", name="Ada"), seconds=60, what="the approval")
    thread.join(60)
    assert "Changed after 1 reviews: Shorter." in outcome[0]
    assert crews["draft"].requests["resume"] == 2
    assert {name: server.kickoffs for name, server in crews.items()} == {"research": 1, "draft": 1}
