"""What a webhook brought of a question: kept for whoever answers, in Prefect's own Secret blocks.

The text that is to be judged may be long and is not for everyone, and a callback holds a token. A Variable is read by
whoever sees the server and holds 5,000 characters; a block is encrypted, and is where a crew's token is kept as well.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from prefect_crew.client._callbacks import FeedbackRequest

if TYPE_CHECKING:
    from prefect_crew.records.model import RunRecord


MAX_OUTPUT = 200_000
"""Characters of what is to be judged; of a longer one nothing is kept, since half of it is not what is judged."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _of_run(idempotency_key: str, attempt: int) -> str:
    return f"crew-asked-{_digest(idempotency_key)}-{attempt}-"


async def keep_output(idempotency_key: str, attempt: int, answers: int, output: str) -> None:
    """Keep what is to be judged in the question that came after so many answers, modulo 256.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    if len(output) <= MAX_OUTPUT:
        block: Any = Secret(value=cast("Any", {"output": output}))
        await block.save(f"{_of_run(idempotency_key, attempt)}{answers % 256}", overwrite=True, _sync=False)


async def kept_output(record: RunRecord, answers: int) -> str | None:
    """Return what a webhook brought of the question that came after so many answers, None if nothing is kept.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    name = f"{_of_run(record.idempotency_key, record.attempt)}{answers % 256}"
    async with get_client() as client:
        try:
            found = await client.read_block_document_by_name(name, "secret", include_secrets=True)
        except ObjectNotFound:
            return None
    value: Any = found.data.get("value")
    output: Any = cast("dict[str, Any]", value).get("output") if isinstance(value, dict) else None
    return output if isinstance(output, str) else None


def _requests_of(kickoff_id: str) -> str:
    return f"crew-request-{_digest(kickoff_id)}-"


async def keep_request(request: FeedbackRequest) -> None:
    """Keep what a Flow asks, with the URL that takes the answer.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    value = request.model_dump(mode="json")
    value["callback_url"] = request.callback_url.get_secret_value()
    if len(request.output or "") > MAX_OUTPUT:
        value["output"] = None
    block: Any = Secret(value=cast("Any", value))
    await block.save(f"{_requests_of(request.kickoff_id)}{request.id}", overwrite=True, _sync=False)


async def kept_requests(kickoff_id: str | None = None) -> list[FeedbackRequest]:
    """Return what a Flow asks and has no answer that was sent from here, or what all Flows ask.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    prefix = "crew-request-" if kickoff_id is None else _requests_of(kickoff_id)
    async with get_client() as client:
        wanted = {"block_documents": {"name": {"like_": f"{prefix}%"}}, "include_secrets": True, "limit": 200}
        answer = await client.request("POST", "/block_documents/filter", json=wanted)
    return [
        FeedbackRequest.model_validate(one["data"]["value"])
        for one in answer.json()
        if str(one["name"]).startswith(prefix)
    ]


async def forget_request(request: FeedbackRequest) -> None:
    """Forget what was asked: it has its answer.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    async with get_client() as client:
        try:
            name = f"{_requests_of(request.kickoff_id)}{request.id}"
            found = await client.read_block_document_by_name(name, "secret", include_secrets=False)
        except ObjectNotFound:
            return
        await client.delete_block_document(found.id)


async def forget_notes(record: RunRecord) -> None:
    """Forget all that is kept of an attempt's questions.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    prefix = _of_run(record.idempotency_key, record.attempt)
    async with get_client() as client:
        wanted = {"block_documents": {"name": {"like_": f"{prefix}%"}}, "include_secrets": False, "limit": 200}
        answer = await client.request("POST", "/block_documents/filter", json=wanted)
        for one in answer.json():
            if str(one["name"]).startswith(prefix):
                await client.delete_block_document(one["id"])
