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

if TYPE_CHECKING:
    from prefect_crew.records import RunRecord

__all__ = ["forget_notes", "keep_output", "kept_output"]

MAX_OUTPUT = 200_000
"""Characters of what is to be judged; of a longer one nothing is kept, since half of it is not what is judged."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _of_run(run_key: str, attempt: int) -> str:
    return f"crew-asked-{_digest(run_key)}-{attempt}-"


async def keep_output(run_key: str, attempt: int, answers: int, output: str) -> None:
    """Keep what is to be judged in the question that came after so many answers, modulo 256.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    if len(output) <= MAX_OUTPUT:
        block: Any = Secret(value=cast("Any", {"output": output}))
        await block.save(f"{_of_run(run_key, attempt)}{answers % 256}", overwrite=True, _sync=False)


async def kept_output(record: RunRecord, answers: int) -> str | None:
    """Return what a webhook brought of the question that came after so many answers, None if nothing is kept.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    name = f"{_of_run(record.run_key, record.attempt)}{answers % 256}"
    async with get_client() as client:
        try:
            found = await client.read_block_document_by_name(name, "secret", include_secrets=True)
        except ObjectNotFound:
            return None
    value: Any = found.data.get("value")
    output: Any = cast("dict[str, Any]", value).get("output") if isinstance(value, dict) else None
    return output if isinstance(output, str) else None


async def forget_notes(record: RunRecord) -> None:
    """Forget all that is kept of an attempt's questions.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    prefix = _of_run(record.run_key, record.attempt)
    async with get_client() as client:
        wanted = {"block_documents": {"name": {"like_": f"{prefix}%"}}, "include_secrets": False, "limit": 200}
        answer = await client.request("POST", "/block_documents/filter", json=wanted)
        for one in answer.json():
            if str(one["name"]).startswith(prefix):
                await client.delete_block_document(one["id"])
