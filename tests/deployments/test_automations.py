"""The automations: set up as often as one likes, derived from what is deployed, and received by the alert's
receiver."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from prefect_crew import CrewError, WaitPolicy, run_batch, run_crew
from prefect_crew.devserver import CrewServer
from support.prefect_server import connected, drain
from support.receiver import Receiver
from support.site import Site
from support.waiting import wait_until

APPLY = ("prefect-crew", "automations", "apply")
ALERTS = {f"prefect-crew: alert {what}" for what in ("problem", "asked", "waiting", "batch")}
RECOVERY = {"prefect-crew: no heartbeat", "prefect-crew: recover"}
BROKEN = "name: broken\ntasks: [{name: t, fail: the well is dry}]\n"
REVIEWED = "name: reviewed\ntasks: [{name: t, output: the draft, human: true}]\n"


def automations(site: Site) -> dict[str, dict[str, Any]]:
    existing = site.call("POST", "/automations/filter", {})
    return {each["name"]: each for each in existing if each["name"].startswith("prefect-crew")}


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


def wait_for_alert(receiver: Receiver, subject: str) -> str:
    drain()

    def body() -> str | None:
        return next((got.body["body"] for got in receiver.got if got.body["subject"] == subject), None)

    return wait_until(body, f"an alert about {subject!r}")


def run_badly(site: Site, name: str, crew: CrewServer, **wait: float) -> None:
    """Store a crew under a name and run it with that key, to an end that is not a result."""
    block: Any = crew.crew()
    policy = WaitPolicy.model_validate({"initial": 0.1, "max_interval": 0.5, **wait})
    with connected(site.server, site.folder / "home"):
        block.save(name, overwrite=True, _sync=True)
        with pytest.raises(CrewError):
            run_crew(name, {"text": "ciao"}, idempotency_key=name, wait=policy)


def test_a_second_apply_fits_what_is_deployed_and_disabled(site: Site):
    """A run has crashed after three of the slowest heartbeats."""
    first = automations(site)
    assert first["prefect-crew: no heartbeat"]["trigger"]["within"] == 90
    flow_id = site.deployment("one-crew/daily")["flow_id"]
    body = {"name": "slow-heart", "flow_id": flow_id, "tags": ["recover-crashed"]}
    slow = site.call("POST", "/deployments/", body)["id"]
    recovery = f"/automations/{first['prefect-crew: recover']['id']}"
    site.call("PATCH", recovery, {"enabled": False})
    try:
        printed = site.run(*APPLY, "--max-attempts", "5")
        assert "no heartbeat for 540 s" in printed
        assert "recover\tdisabled\t" in printed
        second = automations(site)
        assert second["prefect-crew: no heartbeat"]["trigger"]["within"] == 540
        assert second["prefect-crew: recover"]["id"] == first["prefect-crew: recover"]["id"]
        assert not second["prefect-crew: recover"]["enabled"]
        assert second["prefect-crew: recover"]["actions"][0]["parameters"]["max_attempts"] == 5
    finally:
        site.call("DELETE", f"/deployments/{slow}")
        site.call("PATCH", recovery, {"enabled": True})
    assert "no heartbeat for 90 s" in site.run(*APPLY)


FAILURES: dict[str, tuple[Any, list[str], dict[str, float], list[str]]] = {
    "failed": (BROKEN, [], {}, ["the well is dry", "in flow run failed-crew"]),
    "uncertain": ("echo", ["kickoff:drop-after-accept"], {}, ["prefect-crew runs resolve 'uncertain-crew'"]),
    "timed out": ("echo", ["kickoff:stuck"], {"timeout": 0.5}, ["time limit of 0.5 s is over"]),
}
"""By what an alert says of a crew: the crew, its server's faults, its policy, and what else the alert says."""


@pytest.mark.parametrize("end", FAILURES)
def test_an_end_without_a_result_is_reported(end: str, site: Site, alerted: Receiver):
    spec, faults, wait, texts = FAILURES[end]
    name = f"{end.replace(' ', '-')}-crew"
    with CrewServer(spec, faults=faults) as crew:
        run_badly(site, name, crew, **wait)
        (run,) = crew.runs
    body = wait_for_alert(alerted, f"Crew {name}: {end}")
    for text in texts:
        assert text in body
    assert end == "uncertain" or run.id in body


def test_a_batch_that_is_not_whole_is_reported(site: Site, alerted: Receiver, tmp_path: Path):
    with CrewServer(BROKEN) as crew, connected(site.server, site.folder / "home"):
        options: dict[str, Any] = {"name": "tonight's", "export": str(tmp_path / "out.jsonl")}
        run_batch(crew.crew(), [{"text": "ciao"}], **options)
    body = wait_for_alert(alerted, f"Crew {crew.url.removeprefix('http://')}: batch failed")
    for text in ("Batch tonight's, in flow run tonight's", "0 of 1 rows completed, 1 failed"):
        assert text in body
    assert """prefect-crew batch inspect 'tonight'"'"'s'""" in body


@pytest.mark.slow
def test_a_crew_that_waits_for_a_person_is_reported(site: Site, alerted: Receiver):
    with CrewServer(REVIEWED) as crew:
        run_badly(site, "reviewed", crew, human_timeout=40)
    # Sent while the crew still waited, not because of its end.
    body = wait_for_alert(alerted, "Crew reviewed: waiting for a person")
    assert "prefect-crew reviews approve" in body
    assert "question 1" in wait_for_alert(alerted, "Crew reviewed: asks a person")
