"""What a webhook brought of a question: kept for whoever answers, in Prefect's own Secret blocks.

The text that is to be judged may be long and is not for everyone, and a callback holds a token. A Variable is read by
whoever sees the server and holds 5,000 characters; a block is encrypted, and is where a crew's token is kept as well.
Every function raises one of PREFECT_ERRORS where the Prefect API is away or refuses.
"""

from __future__ import annotations

from typing import Any, cast
from uuid import UUID

from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client

from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.records.model import RunRecord, digest

MAX_OUTPUT = 200_000
"""Characters of what is to be judged; of a longer one nothing is kept, since half of it is not what is judged."""
PAGE = 200  # blocks in one answer of Prefect, at most
_REQUEST = "crew-request-"


def _of_run(idempotency_key: str, attempt: int, answers: int | None = None) -> str:
    return f"crew-asked-{digest(idempotency_key)}-{attempt}-{'' if answers is None else answers % 256}"


def _of_request(kickoff_id: str, request_id: str = "") -> str:
    return f"{_REQUEST}{digest(kickoff_id)}-{request_id}"


async def _save(name: str, value: Any) -> None:
    block: Any = Secret(value=value)
    await block.save(name, overwrite=True, _sync=False)


async def _find(prefix: str) -> dict[str, tuple[UUID, Any]]:
    """Return id and value of the blocks whose names begin with a text, by their names, the newest first."""
    wanted = {"block_documents": {"name": {"like_": f"{prefix}%"}}, "include_secrets": True, "limit": PAGE}
    found = list[dict[str, Any]]()
    async with get_client() as client:
        while len(found) % PAGE == 0:
            answer = await client.request("POST", "/block_documents/filter", json=wanted | {"offset": len(found)})
            page: list[dict[str, Any]] = answer.json()
            found += page
            if not page:
                break
    found.sort(key=lambda one: str(one["created"]), reverse=True)
    named = {str(one["name"]): (UUID(one["id"]), one["data"].get("value")) for one in found}
    return {name: one for name, one in named.items() if name.startswith(prefix)}


async def _delete(prefix: str) -> None:
    found = await _find(prefix)
    async with get_client() as client:
        for block_id, _ in found.values():
            await client.delete_block_document(block_id)


async def keep_output(idempotency_key: str, attempt: int, answers: int, output: str) -> None:
    """Keep what is to be judged in the question that came after so many answers, modulo 256."""
    if len(output) <= MAX_OUTPUT:
        await _save(_of_run(idempotency_key, attempt, answers), {"output": output})


async def kept_output(record: RunRecord, answers: int) -> str | None:
    """Return what a webhook brought of the question that came after so many answers, None if nothing is kept."""
    name = _of_run(record.idempotency_key, record.attempt, answers)
    _, value = (await _find(name)).get(name, (None, None))
    output: Any = cast("dict[str, Any]", value).get("output") if isinstance(value, dict) else None
    return output if isinstance(output, str) else None


async def forget_notes(record: RunRecord) -> None:
    """Forget all that is kept of an attempt's questions."""
    if record.has_webhooks:
        await _delete(_of_run(record.idempotency_key, record.attempt))
    if record.kickoff_id is not None:
        await _delete(_of_request(record.kickoff_id))


async def keep_request(request: FeedbackRequest) -> None:
    """Keep what a Flow asks, with the URL that takes the answer."""
    value = {**request.model_dump(mode="json"), "callback_url": request.callback_url.get_secret_value()}
    if len(request.output or "") > MAX_OUTPUT:
        value["output"] = None
    await _save(_of_request(request.kickoff_id, request.id), value)


async def kept_requests(kickoff_id: str | None = None) -> list[FeedbackRequest]:
    """Return what a Flow asks and has no answer that was sent from here, or what all Flows ask, the latest first."""
    found = await _find(_REQUEST if kickoff_id is None else _of_request(kickoff_id))
    return [FeedbackRequest.model_validate(value) for _, value in found.values()]


async def forget_request(request: FeedbackRequest) -> None:
    """Forget what was asked: it has its answer."""
    await _delete(_of_request(request.kickoff_id, request.id))
