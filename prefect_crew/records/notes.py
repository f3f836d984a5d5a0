"""The texts of questions from webhooks. Prefect's own Secret blocks hold them until the run has ended.

The text to judge may be long and is not for everyone, and the callback URL of a Flow's question contains a token.
Everybody with access to the server can read a Variable, and it holds 5,000 characters. A block is encrypted; a crew's
token is in a block as well. Each block is read by its exact name:

- `crew-question-KEY-CLAIM-ANSWERS` is what the webhooks after so many answers brought: the run's id by then, and of a
  human-input webhook the task that waits and the output to judge. Another run of the same key has another claim.
- `crew-question-RUN` is the question of a Flow. A Flow waits for one answer at a time, so a later question replaces it.

Every function raises one of PREFECT_ERRORS if the Prefect API cannot be reached or refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from prefect_crew.client.models import ReviewRequest
from prefect_crew.records.model import RunRecord, claim_of, digest

MAX_OUTPUT = 200_000
"""The most characters of a text to judge. A longer text is not stored: nobody can judge a part of it."""
PAGE = 200
"""Names in one request, at most."""
NUMBERS = 256
"""A webhook's URL has the number of answers before its question, modulo this."""


class Note(NamedTuple):
    """What the webhooks after one number of answers brought. `task_id` is None if no person was asked."""

    kickoff_id: str | None
    task_id: str | None = None
    output: str | None = None


class _Block(NamedTuple):
    id: UUID
    value: Any


def _output_name(idempotency_key: str, claim: str | None, answers: int) -> str:
    return f"crew-question-{digest(idempotency_key)}-{claim}-{answers % NUMBERS}"


def _question_name(kickoff_id: str) -> str:
    return f"crew-question-{digest(kickoff_id)}"


async def _save(name: str, value: Any, *, overwrite: bool = True) -> None:
    block: Any = Secret(value=value)
    await block.save(name, overwrite=overwrite, _sync=False)


async def _read(names: Sequence[str]) -> dict[str, _Block]:
    """Return the existing blocks by their names. One `POST /block_documents/filter` reads 200 names."""
    blocks: dict[str, _Block] = {}
    async with get_client() as client:
        for first in range(0, len(names), PAGE):
            filters: dict[str, Any] = {"block_documents": {"name": {"any_": names[first : first + PAGE]}}}
            filters |= {"block_types": {"slug": {"any_": ["secret"]}}, "include_secrets": True, "limit": PAGE}
            documents: list[dict[str, Any]] = (
                await client.request("POST", "/block_documents/filter", json=filters)
            ).json()
            blocks |= {
                str(document["name"]): _Block(UUID(document["id"]), document["data"].get("value"))
                for document in documents
            }
    return blocks


async def _delete(*blocks: _Block) -> None:
    async with get_client() as client:
        for block in blocks:
            try:
                await client.delete_block_document(block.id)
            except ObjectNotFound:  # somebody else deleted it
                continue


async def keep_note(idempotency_key: str, claim: str | None, answers: int, note: Note) -> None:
    """Store what the webhooks after this number of answers brought. One of another kind replaces no question."""
    is_question = note.task_id is not None
    try:
        await _save(_output_name(idempotency_key, claim, answers), note._asdict(), overwrite=is_question)
    except ValueError:  # the block exists
        if is_question:
            raise


async def kept_note(record: RunRecord, answers: int) -> Note:
    """Return what the webhooks after this number of answers brought."""
    name = _output_name(record.idempotency_key, claim_of(record.owner), answers)
    block = (await _read([name])).get(name)
    return Note(None) if block is None else Note(**block.value)


async def keep_question(question: ReviewRequest) -> None:
    """Store a Flow's question, with the URL for the answer, in place of the run's earlier question."""
    name = _question_name(question.kickoff_id)
    # A new block: a caller that forgets the earlier question deletes the earlier block by its id.
    await _delete(*(await _read([name])).values())
    value = question.model_dump(mode="json", exclude_defaults=True)
    if question.callback_url is not None:
        value["callback_url"] = question.callback_url.get_secret_value()
    if len(question.output or "") > MAX_OUTPUT:
        del value["output"]
    await _save(name, value)


async def kept_questions(*kickoff_ids: str) -> dict[str, ReviewRequest]:
    """Return the stored questions of Flows, by the kickoff ids of their runs."""
    blocks = await _read([_question_name(kickoff_id) for kickoff_id in kickoff_ids])
    questions = [ReviewRequest.model_validate(block.value) for block in blocks.values()]
    return {question.kickoff_id: question for question in questions}


async def forget_question(question: ReviewRequest) -> None:
    """Delete a Flow's question, which takes no more answers, unless a later question has replaced it."""
    for block in (await _read([_question_name(question.kickoff_id)])).values():
        if block.value.get("id") == question.id:
            await _delete(block)


async def forget_notes(record: RunRecord, answers: int) -> None:
    """Delete the stored questions of an attempt.

    Their numbers follow from `answers`, the number of people's answers.
    """
    names = [] if record.kickoff_id is None else [_question_name(record.kickoff_id)]
    if record.has_webhooks:
        numbers = range(min(answers + 2, NUMBERS))  # one more, in case the last answer was taken back
        names += [_output_name(record.idempotency_key, claim_of(record.owner), number) for number in numbers]
    if names:
        await _delete(*(await _read(names)).values())
