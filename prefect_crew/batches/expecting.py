"""What a crew names as its inputs, asked for with more patience than for one run: it decides what a row is."""

from __future__ import annotations

import asyncio

from prefect_crew.api.errors import AuthenticationError, CrewConnectionError, CrewError, ServerError
from prefect_crew.api.models import CrewInput
from prefect_crew.crew import CrewSession
from prefect_crew.logs import run_logger

__all__ = ["expected_inputs"]

TRIES = 3


async def expected_inputs(session: CrewSession) -> list[CrewInput]:
    """Return what the crew names as its inputs; empty where it does not say.

    Raises:
        AuthenticationError: The token is refused.
        CrewConnectionError: The crew's server does not answer.
    """
    for left in reversed(range(TRIES)):
        try:
            return await session.asked(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except (CrewConnectionError, ServerError) as error:
            # A moment's trouble must not make all columns inputs, and so every row another one.
            if left:
                await asyncio.sleep(1.0)
                continue
            if isinstance(error, CrewConnectionError):
                raise
            _not_known(error)
        except CrewError as error:
            _not_known(error)
        return []
    return []


def _not_known(error: CrewError) -> None:
    run_logger().warning("The crew's inputs are not known, so rows are not checked for them: %s", error)
