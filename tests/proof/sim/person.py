"""A person who knows: looks at the crew's own page and says what became of an uncertain kickoff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_crew.client.inputs import Inputs
from prefect_crew.exceptions import (
    CrewFailedError,
    CrewStoppedError,
    CrewTimeoutError,
    KickoffUncertainError,
    SessionBlockedError,
)
from prefect_crew.records.model import RunRecord
from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved
from prefect_crew.records.store import PrefectRecords

if TYPE_CHECKING:
    from proof.sim.world import Value, World

__all__ = ["resolve_if_allowed", "resolve_truly"]


async def resolve_truly(world: World, idempotency_key: str, said: Value) -> bool:
    """Resolve an uncertain run by what the crew's server knows; True if asking once more can bring something new.

    Raises:
        CrewError: There is nothing to resolve (any more).
        httpx.HTTPError: The Prefect API is away.
    """
    if isinstance(said, CrewFailedError | CrewStoppedError) or (isinstance(said, CrewTimeoutError) and said.stopped):
        return True
    if isinstance(said, SessionBlockedError):
        idempotency_key = said.run
    elif not isinstance(said, KickoffUncertainError):
        return False
    if idempotency_key.startswith("batch/"):
        await world.batches.resolve(int(idempotency_key.split("/")[1][1:]))
        return True
    await resolve_if_allowed(world, idempotency_key)
    return True


def _sent(inputs: Mapping[str, Any], record: RunRecord) -> Inputs:
    """Return the inputs as the caller gave them: the session of a run adds the id of its state."""
    if record.session is None:
        return Inputs.of(inputs)
    return Inputs({name: value for name, value in inputs.items() if name != "id"}, session=record.session)


async def resolve_if_allowed(world: World, idempotency_key: str) -> None:
    """Resolve a run by what the crew's page shows at this moment.

    Raises:
        CrewError: There is nothing to resolve (any more), or it is too early.
        httpx.HTTPError: The Prefect API is away.
    """
    records = PrefectRecords()
    record = await unresolved(idempotency_key, records)
    held = {
        one.get("kickoff_id")
        for key in {idempotency_key, *(run.meta["idempotency_key"] for run in world.site.runs), *world.site.same_ids}
        for one in [*world.prefect.records(key), *world.prefect.gone(key)]
    }
    unknown = [
        run.id
        for run in world.site.runs
        if (run.meta["idempotency_key"], run.meta["run_attempt"]) == (idempotency_key, record.attempt)
        and run.id not in held
        and _sent(run.inputs, record).digest == record.inputs_digest
    ]
    if unknown:
        await resolve_started(record, unknown[-1], records)
    else:
        await resolve_never_started(record, records)
    world.resolved.append(idempotency_key)
