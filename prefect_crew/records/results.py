"""Results that are too large for a Variable. Each is the data of a Prefect artifact of type `result` without a key.

Prefect's pages do not list artifacts of this type. An artifact holds up to 5 MB, is written in one request, and is
found by its id, which the end of the run names. So everybody who shares the Prefect server reads the result, also when
the crew's server is gone. The artifact belongs to no flow run: it lives as long as the record, and is pruned with it.
"""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterId
from prefect.exceptions import ObjectNotFound

from prefect_crew._internal.prefect_api import Urgency, is_busy, request_soon, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.records.model import RunRecord, StoredResult

LARGEST = 5_000_000
"""Bytes of JSON: Prefect Cloud refuses a request over 5 MiB."""
KEEP_FOR = 10.0
"""Seconds for which the artifact is tried again while the Prefect API is busy: the end of the run waits for it."""


async def keep_result(result: StoredResult) -> str | None:
    """Create the artifact of a result, and return its id; None if the result is too large or Prefect does not take it.

    The end of the run is then written without it, and the result is read from the crew's server.
    """
    try:
        text = result.model_dump_json()
        if len(text.encode()) > LARGEST:
            return None
        # A text, and no JSON: a database may not hold each number and depth of a result.
        artifact = {"type": "result", "data": text, "description": "The result of a crew's run"}
        async with get_client() as client:
            new: dict[str, object] = {"json": artifact, "urgency": Urgency.FINISH, "alone": False, "again": is_busy}
            answer = await request_soon(client, "POST", "/artifacts/", give_up_after=KEEP_FOR, **new)  # type: ignore[arg-type]
        return str(answer.json()["id"])
    except (*PREFECT_ERRORS, ValueError) as error:
        reason = type(error).__name__
        run_logger().warning("A large result is not on record (%s): it is read from the crew's server.", reason)
        return None


async def stored_result(record: RunRecord) -> StoredResult | None:
    """Return the result that is on record, None where the crew's server has to be asked."""
    if record.result is not None or record.result_id is None:
        return record.result
    try:
        async with get_client() as client:
            by_id = ArtifactFilter(id=ArtifactFilterId(any_=[UUID(record.result_id)]))
            for artifact in await client.read_artifacts(artifact_filter=by_id):
                return StoredResult.model_validate_json(str(artifact.data))
    except (*PREFECT_ERRORS, ValueError) as error:
        reason = type(error).__name__
        run_logger().warning("The result of run %s could not be read (%s).", record.idempotency_key, reason)
    return None


async def forget_result(result_id: str | None) -> None:
    """Delete the artifact of a result, if there is one. Raises one of PREFECT_ERRORS where Prefect does not do so."""
    if result_id is not None:
        async with get_client() as client:
            try:
                await client.delete_artifact(UUID(result_id))
            except ObjectNotFound:  # somebody else has
                return
