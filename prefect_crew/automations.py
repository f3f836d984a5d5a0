"""Automations that begin crashed flow runs again, and that tell people of questions and problems."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.events.schemas.automations import AutomationCore

from prefect_crew.artifacts.events import LINK

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

PAGE = 200
TAG = "prefect-crew"
"""Of the automations and deployments that this package makes."""
RECOVERED_TAG = "recover-crashed"
"""Of the deployments whose crashed flow runs are begun again."""
RECOVER = "recover/crashed"
"""The deployment that begins crashed flow runs again."""
PREFECTS_HEARTBEAT = 180
"""Seconds: Prefect's own default of PREFECT_FLOWS_HEARTBEAT_FREQUENCY."""
BEAT = "prefect.flow-run.heartbeat"
SILENT = (
    *("AwaitingConcurrencySlot", "AwaitingRetry", "Scheduled", "Suspended"),
    *("Cancelled", "Completed", "Crashed", "Failed", "TimedOut"),
)
"""States, by name, in which a flow run sends no heartbeat and has not crashed. A paused one sends them."""
RECOVERED = {
    "match": {"prefect.resource.id": "prefect.flow-run.*"},
    "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{RECOVERED_TAG}"},
}


def _quoted(field: str) -> str:
    """Return a field of an event's payload as a shell takes it, whatever is in it: people paste what an alert says."""
    return "'{{ event.payload." + field + """ | replace("'", '\\'"\\'"\\'') }}'"""


CREW_RUNS = {"match": {"prefect.resource.id": "prefect-crew.run.*"}}
CREW_BATCHES = {"match": {"prefect.resource.id": "prefect-crew.batch.*"}}
FLOW_RUN = "{% if flow_run %}, in flow run {{ flow_run.name }} {{ flow_run | ui_url or '' }}{% endif %}\n\n"
HEAD = (
    f"Run {{{{ event.payload.kickoff_id or 'without an id' }}}}, key {{{{ event.payload.idempotency_key }}}}{FLOW_RUN}"
)
BATCH = (
    f"Batch {{{{ event.payload.batch }}}}{FLOW_RUN}"
    "{{ event.payload.reason }}\n\nIts rows: prefect-crew batch inspect "
    f"{_quoted('batch')}"
)
QUESTION = (
    "Task {{ event.payload.task_id }}, question {{ event.payload.round }}."
    "{% if event.payload.page %} The form: {{ event.payload.page }}{% endif %}\n\n{{ event.payload.answer }}"
)
WAIT_ENDS = [f"crew.{end}" for end in ("resumed", "completed", "failed", "stopped", "lost", "timed_out")]
PROBLEMS = [f"crew.{problem}" for problem in ("failed", "uncertain", "lost", "timed_out")]
PROBLEM = (
    "{% if event.event == 'crew.failed' %}{{ event.payload.error or 'The crew gave no reason.' }}"
    "{% elif event.event == 'crew.uncertain' %}It is not known whether the kickoff started a run: "
    "{{ event.payload.reason }}. Look at the crew's page, then: prefect-crew runs resolve "
    f"{_quoted('idempotency_key')} --kickoff-id ID, or --never-started."
    "{% elif event.event == 'crew.lost' %}The crew's server no longer knows the run. Look at its page."
    "{% else %}Its {{ event.payload.phase }} time limit of {{ event.payload.limit }} s is over. It may still run."
    "{% endif %}"
)


def recovery_automations(recover_id: UUID, *, heartbeat: int, max_attempts: int) -> list[AutomationCore]:
    """Return the automations that find crashed flow runs of tagged deployments and begin them again.

    Flow runs of a crew worker send no heartbeats. Another worker takes over the flow runs of a worker that died.

    Args:
        recover_id: The deployment of `prefect_crew.operations.recover`.
        heartbeat: Seconds between two heartbeats of the slowest flow run.
        max_attempts: The number of times that a flow run may begin in all.
    """
    silence = 3 * heartbeat
    crashed = {
        "type": "change-flow-run-state",
        "state": "CRASHED",
        "name": "Crashed",
        "message": f"No heartbeat for {silence} s.",
    }
    flow_run_id = {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}
    recover = {
        "type": "run-deployment",
        "source": "selected",
        "deployment_id": recover_id,
        "parameters": {"flow_run_id": flow_run_id, "max_attempts": max_attempts},
    }
    beats = [BEAT, *(f"prefect.flow-run.{state}" for state in SILENT)]
    return [
        _automation(
            "no heartbeat",
            f"Sets a flow run tagged {RECOVERED_TAG} to Crashed that has sent no heartbeat for {silence} s.",
            _unless(RECOVERED, beats, after=BEAT, within=silence),
            crashed,
        ),
        _automation(
            "recover",
            f"Begins a crashed flow run tagged {RECOVERED_TAG} again, {max_attempts} times in all at most.",
            _when(RECOVERED, ["prefect.flow-run.Crashed"]),
            recover,
        ),
    ]


def alert_automations(block_id: UUID, *, waiting: timedelta) -> list[AutomationCore]:
    """Return the automations that tell people, through a block; `waiting` is the time for an answer."""

    def alert(name: str, when: str, trigger: dict[str, Any], subject: str, body: str) -> AutomationCore:
        subject = "Crew {{ event.resource['prefect-crew.crew'] }}: " + subject
        action = {"type": "send-notification", "block_document_id": block_id, "subject": subject, "body": body}
        return _automation(f"alert {name}", f"Sends an alert when {when}.", trigger, action)

    is_bad = "a run has failed, is uncertain or lost, or its time limit is over"
    word = "{{ event.event | replace('crew.', '') | replace('_', ' ') }}"
    is_late, late = (
        f"a crew has waited for a person for {waiting}",
        f"{HEAD}No one has answered for {waiting}. {QUESTION}",
    )
    half = "a batch has ended and not every row of it has completed"
    asked = {"match": {**CREW_RUNS["match"], LINK: "no"}}
    question = _when(asked, ["crew.waiting"])
    unanswered = _unless(CREW_RUNS, WAIT_ENDS, after="crew.waiting", within=waiting.total_seconds())
    return [
        alert("problem", is_bad, _when(CREW_RUNS, PROBLEMS), word, HEAD + PROBLEM),
        alert("asked", "a crew asks a person, once a question", question, "asks a person", HEAD + QUESTION),
        alert("waiting", is_late, unanswered, "waiting for a person", late),
        alert("batch", half, _when(CREW_BATCHES, ["crew.batch.failed"]), "batch failed", BATCH),
    ]


def _automation(name: str, description: str, trigger: dict[str, Any], action: dict[str, Any]) -> AutomationCore:
    fields = {"name": f"{TAG}: {name}", "description": description, "tags": [TAG]}
    return AutomationCore.model_validate({**fields, "trigger": trigger, "actions": [action]})


def _when(runs: dict[str, Any], events: Sequence[str]) -> dict[str, Any]:
    """Return a trigger that fires at each of these events."""
    return {"type": "event", "posture": "Reactive", **runs, "expect": events, "threshold": 1, "within": 0}


def _unless(runs: dict[str, Any], events: Sequence[str], *, after: str, within: float) -> dict[str, Any]:
    """Return a trigger that fires if none of these events follows in time (seconds), for each run by itself."""
    proactive = {"posture": "Proactive", "after": [after], "for_each": ["prefect.resource.id"], "within": within}
    return {**_when(runs, events), **proactive}


async def apply_automation(client: PrefectClient, automation: AutomationCore) -> Literal["created", "updated"]:
    """Create an automation, or bring the one of its name up to date. A disabled automation stays disabled."""
    existing = await client.read_automations_by_name(automation.name)
    if not existing:
        await client.create_automation(automation)
        return "created"
    # Given whole: of what is left unset the client would send nothing.
    automation.enabled = existing[0].enabled
    whole = AutomationCore.model_validate(automation.model_dump(exclude={"owner_resource"}))
    await client.update_automation(existing[0].id, whole)
    return "updated"


async def slowest_heartbeat(client: PrefectClient) -> int:
    """Return the longest heartbeat, in seconds, of the deployments that have the tag `RECOVERED_TAG`.

    A deployment that sets none has Prefect's default, which is also the answer if there are no such deployments.
    """
    tagged = await client.read_deployments(
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[RECOVERED_TAG])), limit=PAGE
    )
    environments: list[dict[str, Any]] = [deployment.job_variables.get("env") or {} for deployment in tagged]
    frequencies = [env.get("PREFECT_FLOWS_HEARTBEAT_FREQUENCY") for env in environments]
    return max((int(float(seconds or PREFECTS_HEARTBEAT)) for seconds in frequencies), default=PREFECTS_HEARTBEAT)
