"""Results that are too large for a Variable. Each is the data of a Prefect artifact of type `result` without a key.

Prefect's pages do not list artifacts of this type. An artifact holds up to 5 MB, and one request writes it. The end of
the run has its id. So each process that shares the Prefect server can read the result, even after the crew's server is
gone. The artifact belongs to no flow run: it lives as long as the record, and `prune` deletes it with the record.
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
"""Seconds for which the request is repeated while the Prefect API is busy: the end of the run waits for it."""


async def keep_result(result: StoredResult) -> str | None:
    """Create the artifact of a result and return its id. Return None if the result is too large or Prefect refuses it.

    The end of the run then has no result, and callers read it from the crew's server.
    """
    try:
        text = result.model_dump_json()
        if len(text.encode()) > LARGEST:
            return None
        # As a text, not as JSON: databases limit the size of numbers and the depth of JSON.
        artifact = {"type": "result", "data": text, "description": "The result of a crew's run"}
        async with get_client() as client:
            new: dict[str, object] = {"json": artifact, "urgency": Urgency.FINISH, "alone": False, "again": is_busy}
            answer = await request_soon(client, "POST", "/artifacts/", give_up_after=KEEP_FOR, **new)  # type: ignore[arg-type]
        return str(answer.json()["id"])
    except (*PREFECT_ERRORS, ValueError) as error:
        reason = type(error).__name__
        run_logger().warning(
            "Prefect did not store a run's large result (%s). Later calls read it from the crew's server.", reason
        )
        return None


async def stored_result(record: RunRecord) -> StoredResult | None:
    """Return the stored result of a run. If None, ask the crew's server."""
    if record.result is not None or record.result_id is None:
        return record.result
    try:
        async with get_client() as client:
            by_id = ArtifactFilter(id=ArtifactFilterId(any_=[UUID(record.result_id)]))
            for artifact in await client.read_artifacts(artifact_filter=by_id):
                return StoredResult.model_validate_json(str(artifact.data))
    except (*PREFECT_ERRORS, ValueError) as error:
        reason = type(error).__name__
        text = (
            "The stored result of run %s could not be read from Prefect (%s). The call needs the crew's server for it."
        )
        run_logger().warning(text, record.idempotency_key, reason)
    return None


async def forget_result(result_id: str | None) -> None:
    """Delete the artifact of a result, if there is one. Raises one of PREFECT_ERRORS if Prefect does not delete it."""
    if result_id is not None:
        async with get_client() as client:
            try:
                await client.delete_artifact(UUID(result_id))
            except ObjectNotFound:  # somebody else has deleted it
                return
