"""The URL to which the answer to a Flow's question goes. Everybody who has it can answer, so it is a secret: a Secret
block of Prefect has it, and not the crew database, until the question takes no more answers or its run has ended."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

from prefect.blocks.system import Secret
from pydantic import SecretStr

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.exceptions import ConfigurationError, StoreError
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews.questions import digest
from prefect_crew.store import questions
from prefect_crew.store.decision import Attempt
from prefect_crew.store.questions import FLOW, Question


def _block_name(question: Question) -> str:
    return f"crew-question-{digest(question.id)}"


async def keep_callback(question: Question, url: SecretStr) -> None:
    """Store the URL for the answer to a Flow's question. Raises PREFECT_ERRORS."""
    block = cast("Any", Secret)(value=url.get_secret_value())
    await block.save(_block_name(question), overwrite=True, _sync=False)


async def read_callback(kickoff_id: str, question: Question) -> SecretStr:
    """Return the URL for the answer to a Flow's question. Raises ConfigurationError if there is none."""
    for pause in (0.0, 1.0, 2.0, 5.0):  # the receiver stores it a moment after the question
        await asyncio.sleep(pause)
        with suppress(ValueError, *PREFECT_ERRORS):
            block = await cast("Any", Secret).aload(_block_name(question))
            return SecretStr(block.get())
    raise ConfigurationError(
        f"The URL for the answer to run {kickoff_id} cannot be read. Nothing was sent. Answer on the Flow's page on "
        "the CrewAI platform."
    )


async def forget_callback(question: Question) -> None:
    """Delete the URL for the answer to a Flow's question, which takes no more answers."""
    if FLOW in question.marks:
        with suppress(ValueError, *PREFECT_ERRORS):
            await cast("Any", Secret).adelete(_block_name(question))


async def forget_callbacks(attempt: Attempt) -> None:
    """Delete the URLs of a run that has ended. Whoever writes its end calls this."""
    with suppress(StoreError, *PREFECT_ERRORS):
        for question in await in_store(questions.questions_of, attempt.id):
            await forget_callback(question)
