"""The automations: set up as often as one likes, derived from what is deployed, and received by the alert's
receiver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from prefect_crew import CrewError, WaitPolicy, run_crew
from prefect_crew.devserver import CrewServer
from support.prefect_server import connected, drain
from support.receiver import Receiver
from support.site import Site

APPLY = ("prefect-crew", "automations", "apply")
ALERTS = {f"prefect-crew: alert {what}" for what in ("problem", "asked", "waiting")}
RECOVERY = {"prefect-crew: no heartbeat", "prefect-crew: recover"}
BROKEN = "name: broken\ntasks: [{name: t, fail: the well is dry}]\n"
REVIEWED = "name: reviewed\ntasks: [{name: t, output: the draft, human: true}]\n"


def automations(site: Site) -> dict[str, dict[str, Any]]:
    found = site.call("POST", "/automations/filter", {})
    return {one["name"]: one for one in found if one["name"].startswith("prefect-crew")}


@pytest.fixture(scope="module")
def alerted(site: Site) -> Iterator[Receiver]:
    """The site with alerts, which go to a receiver through a block of Prefect's own."""
    with Receiver() as receiver:
        block: Any = CustomWebhookNotificationBlock(
            name="alerts", url=receiver.url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        with connected(site.server, site.folder / "home"):
            block.save("crew-alerts", overwrite=True, _sync=True)
        site.run(*APPLY, "--notify", "custom-webhook/crew-alerts", "--waiting", "11s")
        yield receiver
        for name in ALERTS:
            site.call("DELETE", f"/automations/{automations(site)[name]['id']}")
        assert set(automations(site)) == RECOVERY


def wait_for_alert(receiver: Receiver, subject: str, seconds: float = 60) -> str:
    drain()
    receiver.wait_for(lambda one: any(got.body["subject"] == subject for got in one.got), seconds=seconds)
    return next(got.body["body"] for got in receiver.got if got.body["subject"] == subject)


def run_badly(site: Site, name: str, crew: CrewServer, *, idempotency_key: str | None = None, **wait: float) -> None:
    """Store a crew under a name and run it, to an end that is not a result."""
    block: Any = crew.crew()
    policy = WaitPolicy.model_validate({"initial": 0.1, "max_interval": 0.5, **wait})
    with connected(site.server, site.folder / "home"):
        block.save(name, overwrite=True, _sync=True)
        with pytest.raises(CrewError):
            run_crew(name, {"text": "ciao"}, idempotency_key=idempotency_key, wait=policy)


def test_a_run_counts_as_crashed_after_three_times_the_slowest_heartbeat(site: Site):
    trigger = automations(site)["prefect-crew: no heartbeat"]["trigger"]
    assert trigger["within"] == 90
    body = {"name": "slow-heart", "flow_id": site.deployment("one-crew/daily")["flow_id"], "tags": ["recover-crashed"]}
    slow = site.call("POST", "/deployments/", body)["id"]
    try:
        assert "no heartbeat for 540 s" in site.run(*APPLY)
        assert automations(site)["prefect-crew: no heartbeat"]["trigger"]["within"] == 540
    finally:
        site.call("DELETE", f"/deployments/{slow}")
    assert "no heartbeat for 90 s" in site.run(*APPLY)


def test_one_that_somebody_disabled_stays_disabled(site: Site):
    automation = automations(site)["prefect-crew: recover"]["id"]
    site.call("PATCH", f"/automations/{automation}", {"enabled": False})
    try:
        assert "recover\tdisabled\t" in site.run(*APPLY, "--max-attempts", "5")
        existing = automations(site)["prefect-crew: recover"]
        assert existing["id"] == automation
        assert not existing["enabled"]
        assert existing["actions"][0]["parameters"]["max_attempts"] == 5
    finally:
        site.call("PATCH", f"/automations/{automation}", {"enabled": True})
        site.run(*APPLY)


def test_a_failed_crew_is_reported_with_its_error(site: Site, alerted: Receiver):
    assert set(automations(site)) == RECOVERY | ALERTS
    with CrewServer(BROKEN) as crew:
        run_badly(site, "broken", crew)
        (run,) = crew.runs
    body = wait_for_alert(alerted, "Crew broken: failed")
    assert "the well is dry" in body
    assert run.id in body
    assert "in flow run broken" in body


def test_an_uncertain_kickoff_is_reported_with_how_to_resolve_it(site: Site, alerted: Receiver):
    with CrewServer("echo", faults=["kickoff:drop-after-accept"]) as crew:
        run_badly(site, "dropping", crew, idempotency_key="alert-uncertain")
    body = wait_for_alert(alerted, "Crew dropping: uncertain")
    assert "prefect-crew runs resolve 'alert-uncertain'" in body


def test_a_timeout_is_reported(site: Site, alerted: Receiver):
    with CrewServer("echo", faults=["kickoff:stuck"]) as crew:
        run_badly(site, "stuck", crew, timeout=0.5)
    assert "time limit of 0.5 s is over" in wait_for_alert(alerted, "Crew stuck: timed out")


@pytest.mark.slow
def test_a_crew_that_waits_for_a_person_too_long_is_reported(site: Site, alerted: Receiver):
    with CrewServer(REVIEWED) as crew:
        run_badly(site, "reviewed", crew, human_timeout=40)
    # Sent while the crew still waited, not because of its end.
    body = wait_for_alert(alerted, "Crew reviewed: waiting for a person", seconds=5)
    assert "prefect-crew reviews approve" in body
    asked = wait_for_alert(alerted, "Crew reviewed: asks a person", seconds=5)
    assert "question 1" in asked
