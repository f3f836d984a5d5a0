"""A client for one crew that changes to a rotated token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.api.client import CrewClient

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew

__all__ = ["CrewSession"]


class CrewSession:
    """Used as an async context manager; `client` is the one to use at this moment.

    `connect` makes a client for a crew, in place of `crew.client()`.
    """

    def __init__(self, crew: DeployedCrew, connect: Callable[[DeployedCrew], CrewClient] | None = None) -> None:
        self.crew = crew
        self._connect = connect or _plain
        self._stack = AsyncExitStack()
        self._client: CrewClient | None = None

    async def __aenter__(self) -> CrewSession:
        self._client = await self._stack.enter_async_context(self._connect(self.crew))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def client(self) -> CrewClient:
        """The client with the newest token."""
        if self._client is None:
            raise RuntimeError("This CrewSession is not open: use it in `async with CrewSession(crew) as session`.")
        return self._client

    async def renew(self) -> bool:
        """Take up the token that the stored block has now; False if that is the one that was refused."""
        try:
            fresh = await self.crew.reloaded()
        except (httpx.HTTPError, PrefectException, ValueError):
            return False
        if fresh is None:
            return False
        self.crew = fresh
        self._client = await self._stack.enter_async_context(self._connect(fresh))
        return True


def _plain(crew: DeployedCrew) -> CrewClient:
    return crew.client()
