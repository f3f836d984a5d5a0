"""Set up the automations that keep crews' flow runs going, and that tell people. Run it as often as you like.

    python deployments/automations.py                                     recovery from crashes
    python deployments/automations.py --notify slack-webhook/crew-alerts  and alerts, through that block

Recovery is for flow runs of deployments with the tag recover-crashed, and for crashes only:

- no heartbeat: a run that has sent nothing for three heartbeats has crashed. Needed where a worker dies with its flow
  runs; one that only loses the flow's process says so itself. The longest heartbeat of all tagged deployments counts,
  so run this again when you tag another.
  It does not fire for flow runs of a crew worker: they send no heartbeats, and their workers adopt what is left.
- recover: a crashed run goes to the deployment `recover/crashed`, which begins it again unless it has had its attempts.

Alerts are about crews, whatever flow they run in: failed, uncertain, lost, over their time, waiting for a person, and
waiting for one too long. They need a block that can notify; its type and name are what `prefect block ls` shows.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

TAG = "recover-crashed"
RECOVER = "recover/crashed"
PREFECTS_HEARTBEAT = 180
"""Seconds: Prefect's own default of PREFECT_FLOWS_HEARTBEAT_FREQUENCY."""
BEAT = "prefect.flow-run.heartbeat"
WITHOUT_HEARTBEAT = ["AwaitingConcurrencySlot", "AwaitingRetry", "Scheduled", "Suspended"]
"""States, by name, in which a flow run sends no heartbeat and has not crashed. A paused one sends them: its process
waits."""
ENDS = ["Cancelled", "Completed", "Crashed", "Failed", "TimedOut"]
TAGGED_FLOW_RUNS = {
    "match": {"prefect.resource.id": "prefect.flow-run.*"},
    "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
}
CREW_RUNS = {"match": {"prefect.resource.id": "prefect-crew.run.*"}}


def reactive(event: str, runs: dict[str, Any]) -> dict[str, Any]:
    """Return a trigger that fires at each such event."""
    return {"type": "event", "posture": "Reactive", **runs, "expect": [event], "threshold": 1, "within": 0}


def proactive(after: str, expect: list[str], runs: dict[str, Any], within: timedelta) -> dict[str, Any]:
    """Return a trigger that fires if none of the expected events follows in time, for each run by itself."""
    return {
        "type": "event",
        "posture": "Proactive",
        **runs,
        "after": [after],
        "expect": expect,
        "for_each": ["prefect.resource.id"],
        "threshold": 1,
        "within": within.total_seconds(),
    }


def automation(name: str, trigger: dict[str, Any], action: dict[str, Any], description: str = "") -> AutomationCore:
    """Return an automation of ours."""
    return AutomationCore.model_validate(
        {"name": f"prefect-crew: {name}", "description": description, "trigger": trigger, "actions": [action]}
    )


def recovery(recover_id: UUID, *, heartbeat: int, max_attempts: int) -> Iterator[AutomationCore]:
    """Yield the automations that find crashed flow runs and begin them again.

    Args:
        recover_id: The deployment of flows/recover.py.
        heartbeat: Seconds between two heartbeats of the slowest flow run.
        max_attempts: How often a flow run may be begun in all.
    """
    allowed = timedelta(seconds=3 * heartbeat)
    crashed = {
        "type": "change-flow-run-state",
        "state": "CRASHED",
        "name": "Crashed",
        "message": f"No heartbeat for {3 * heartbeat} s.",
    }
    yield automation(
        "no heartbeat",
        proactive(
            BEAT, [BEAT, *(f"prefect.flow-run.{name}" for name in WITHOUT_HEARTBEAT + ENDS)], TAGGED_FLOW_RUNS, allowed
        ),
        crashed,
        f"A flow run tagged {TAG} that has sent nothing for three heartbeats of {heartbeat} s has crashed.",
    )
    recover = {
        "type": "run-deployment",
        "source": "selected",
        "deployment_id": recover_id,
        "parameters": {
            "flow_run_id": {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"},
            "max_attempts": max_attempts,
        },
    }
    yield automation(
        "recover",
        reactive("prefect.flow-run.Crashed", TAGGED_FLOW_RUNS),
        recover,
        f"A crashed flow run tagged {TAG} is begun again, {max_attempts} times in all at most.",
    )


CREW = "{{ event.resource['prefect-crew.crew'] }}"
HEAD = (
    "Run {{ event.payload.kickoff_id or 'without an id' }}, key {{ event.payload.idempotency_key }}"
    "{% if flow_run %}, in flow run {{ flow_run.name }} {{ flow_run | ui_url or '' }}{% endif %}\n\n"
)
# As a shell takes it, whatever is in it: people paste what an alert says.
QUOTED_KEY = """'{{ event.payload.idempotency_key | replace("'", '\\'"\\'"\\'') }}'"""
ALERTS = {
    "failed": "{{ event.payload.error or 'The crew gave no reason.' }}",
    "uncertain": "It is not known whether the kickoff started a run: {{ event.payload.reason }}. Look at the crew's "
    f"page, then: prefect-crew runs resolve {QUOTED_KEY} --kickoff-id ID, or --never-started.",
    "lost": "The crew's server no longer knows the run. Look at the crew's page.",
    "timed_out": "Its {{ event.payload.phase }} time limit of {{ event.payload.budget }} s is over. It may still run.",
}
"""The body of the alert for each event, in the Jinja that Prefect fills."""
ASKED = (
    "Task {{ event.payload.task_id }}, round {{ event.payload.round }}."
    "{% if event.payload.page %} The form: {{ event.payload.page }}{% endif %}\n\n{{ event.payload.answer }}"
)


def alerts(block_id: UUID, *, waiting: timedelta) -> Iterator[AutomationCore]:
    """Yield the automations that tell people.

    Args:
        block_id: The document of a block that can notify.
        waiting: How long a crew may wait for a person before that is worth an alert.
    """

    def notify(what: str, body: str) -> dict[str, Any]:
        subject = f"Crew {CREW}: {what}"
        return {"type": "send-notification", "block_document_id": block_id, "subject": subject, "body": HEAD + body}

    for event, body in ALERTS.items():
        word = event.replace("_", " ")
        yield automation(f"alert {word}", reactive(f"crew.{event}", CREW_RUNS), notify(word, body))
    ends = [f"crew.{end}" for end in ("resumed", "completed", "failed", "stopped", "lost", "timed_out")]
    yield automation(
        "alert asked",
        reactive("crew.waiting", CREW_RUNS),
        notify("asks a person", ASKED),
        "Each question once, as soon as a flow run that waits has seen it. Disable it where that is too much.",
    )
    yield automation(
        "alert waiting",
        proactive("crew.waiting", ends, CREW_RUNS, waiting),
        notify("waiting for a person", f"No one has answered for {waiting}. {ASKED}"),
    )


async def put(client: PrefectClient, automation: AutomationCore) -> str:
    """Create an automation, or bring the one of its name up to date, and say which. A disabled one stays disabled."""
    existing = await client.read_automations_by_name(automation.name)
    if not existing:
        await client.create_automation(automation)
        return f"created   {automation.name}"
    # Given whole: of what is left unset the client would send nothing.
    whole = {**automation.model_dump(exclude={"owner_resource"}), "enabled": existing[0].enabled}
    await client.update_automation(existing[0].id, AutomationCore.model_validate(whole))
    return f"updated   {automation.name}{'' if existing[0].enabled else ', which is disabled'}"


async def slowest_heartbeat(client: PrefectClient) -> int:
    """Return the longest heartbeat, in seconds, of the deployments with the tag; Prefect's own where they name none."""
    tagged = await client.read_deployments(
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])), limit=200
    )
    named = [one.job_variables.get("env", {}).get("PREFECT_FLOWS_HEARTBEAT_FREQUENCY") for one in tagged]
    return max((int(seconds or PREFECTS_HEARTBEAT) for seconds in named), default=PREFECTS_HEARTBEAT)


async def set_up(*, notify: str | None, max_attempts: int, waiting: timedelta) -> None:
    """Set all automations up, and print what was done.

    Raises:
        SystemExit: The deployment or the block does not exist.
    """
    async with get_client() as client:
        try:
            recover = await client.read_deployment_by_name(RECOVER)
        except ObjectNotFound:
            raise SystemExit(
                f"No deployment {RECOVER}. First: prefect deploy --all --prefect-file deployments/prefect.yaml"
            ) from None
        heartbeat = await slowest_heartbeat(client)
        wanted = list(recovery(recover.id, heartbeat=heartbeat, max_attempts=max_attempts))
        if notify:
            kind, _, name = notify.partition("/")
            try:
                block = await client.read_block_document_by_name(name, kind, include_secrets=False)
            except ObjectNotFound:
                raise SystemExit(f"No block {notify}. prefect block ls shows the types and names of yours.") from None
            wanted += alerts(block.id, waiting=waiting)
        for automation in wanted:
            print(await put(client, automation))
        print(f"Without a heartbeat a flow run counts as crashed after {3 * heartbeat} s.")
        if not notify:
            print("No alerts without --notify TYPE/NAME, such as slack-webhook/crew-alerts; those that stand are kept.")


def main() -> None:
    """Read the command line and set the automations up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notify", metavar="TYPE/NAME", help="the block that alerts go through")
    parser.add_argument("--max-attempts", type=int, default=3, help="how often a flow run is begun in all (3)")
    parser.add_argument("--waiting-hours", type=float, default=4.0, help="how long a crew may wait for a person (4)")
    given = parser.parse_args()
    waiting = timedelta(hours=given.waiting_hours)
    asyncio.run(set_up(notify=given.notify, max_attempts=given.max_attempts, waiting=waiting))


if __name__ == "__main__":
    main()
