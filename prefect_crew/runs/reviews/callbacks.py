"""The URL to which the answer to a Flow's question goes. Everybody who has it can answer, so it is a secret: a Secret
block of Prefect has it until the run has ended, and not the crew database."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

from prefect.blocks.system import Secret
from pydantic import SecretStr

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.exceptions import ConfigurationError, StoreError
from prefect_crew.runs.database import in_store
from prefect_crew.store import questions
from prefect_crew.store.decision import Attempt
from prefect_crew.store.questions import FLOW


def _block_name(flow_id: str) -> str:
    return f"crew-question-{flow_id}"


async def keep_callback(flow_id: str, url: SecretStr) -> None:
    """Store the URL for the answer to the question with this Flow's id, before the question. Raises PREFECT_ERRORS."""
    block = cast("Any", Secret)(value=url.get_secret_value())
    await block.save(_block_name(flow_id), overwrite=True, _sync=False)


async def read_callback(kickoff_id: str, flow_id: str) -> SecretStr:
    """Return the URL for the answer to a Flow's question. Raises ConfigurationError if there is none."""
    with suppress(ValueError, *PREFECT_ERRORS):
        return SecretStr((await cast("Any", Secret).aload(_block_name(flow_id))).get())
    raise ConfigurationError(
        f"The URL for the answer to run {kickoff_id} cannot be read. Nothing was sent. Answer on the Flow's page on "
        "the CrewAI platform."
    )


async def forget_callbacks(attempt: Attempt) -> None:
    """Delete the URLs of a run that has ended. Whoever writes its end calls this."""
    with suppress(StoreError, *PREFECT_ERRORS):
        for question in await in_store(questions.questions_of, attempt.id):
            with suppress(ValueError):  # it is gone
                if FLOW in question.marks:
                    await cast("Any", Secret).adelete(_block_name(question.marks[FLOW]))
