"""Events about runs and batches for automations, with the run, the crew, the flow run and the step as resources.

docs/reference/events.md lists them. `emit` passes an event to Prefect's own background thread (0.15 ms) and raises
nothing if the API cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect.context import FlowRunContext
from prefect.events import emit_event

from prefect_crew.store.decision import Attempt

LINK = "prefect-crew.answer-link"
"""The label of `crew.waiting`: "yes" if a notification with a link goes out for the question, else "no"."""


def emit(
    event: str, attempt: Attempt, *, once: bool = False, labels: Mapping[str, str] | None = None, **payload: Any
) -> None:
    """Emit `crew.{event}` about a run.

    Args:
        event: The last part of its name.
        attempt: The attempt of the run.
        labels: More labels of the resource.
        once: Derive the event's id from the run and the event, so that the server keeps only one if two waits emit it.
        payload: Plain values, already masked.
    """
    run = attempt.first_id or f"{attempt.key}/{attempt.number}"
    resource = {
        "prefect.resource.id": f"prefect-crew.run.{run}",
        "prefect.resource.name": f"{attempt.crew} run {attempt.first_id or attempt.key}",
        "prefect-crew.idempotency-key": attempt.key,
        "prefect-crew.crew": attempt.crew,
    }
    ids = {
        "crew": f"prefect-crew.crew.{attempt.crew}",
        "step": attempt.step and f"prefect-crew.step.{attempt.step}",
        "flow-run": attempt.flow_run_id and f"prefect.flow-run.{attempt.flow_run_id}",
    }
    related = [{"prefect.resource.id": id_, "prefect.resource.role": role} for role, id_ in ids.items() if id_]
    if FlowRunContext.get() is not None:
        # Inside a flow run Prefect adds the flow run itself.
        related = [entry for entry in related if entry["prefect.resource.role"] != "flow-run"]
    emit_event(
        event=f"crew.{event}",
        resource={**resource, **(labels or {})},
        related=related,
        payload={
            "idempotency_key": attempt.key,
            "kickoff_id": attempt.first_id,
            "attempt": attempt.number,
            **payload,
        },
        id=uuid5(NAMESPACE_URL, f"prefect-crew/{attempt.id}/{event}") if once else None,
    )


def emit_batch(end: str, name: str, crew: str, **payload: Any) -> None:
    """Emit `crew.batch.{end}` about a batch, from inside its flow run. The payload has plain values, already masked."""
    emit_event(
        event=f"crew.batch.{end}",
        resource={
            "prefect.resource.id": f"prefect-crew.batch.{name}",
            "prefect.resource.name": f"batch {name}",
            "prefect-crew.batch": name,
            "prefect-crew.crew": crew,
        },
        related=[{"prefect.resource.id": f"prefect-crew.crew.{crew}", "prefect.resource.role": "crew"}],
        payload={"batch": name, **payload},
    )
