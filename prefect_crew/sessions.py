"""A client for one crew that changes to a rotated token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from typing import TYPE_CHECKING, TypeVar

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.api.client import CrewClient
from prefect_crew.api.errors import AuthenticationError, InvalidCallError

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew

__all__ = ["CrewSession"]

T = TypeVar("T")


class CrewSession:
    """Used as an async context manager; `client` is the one to use at this moment.

    `connect` makes a client for a crew, in place of `crew.client()`; `withhold` holds as long as the session is open.
    """

    def __init__(
        self,
        crew: DeployedCrew,
        connect: Callable[[DeployedCrew], CrewClient] | None = None,
        *,
        withhold: AbstractContextManager[None] | None = None,
    ) -> None:
        self.crew = crew
        self._withhold = withhold or nullcontext()
        self._connect = connect or _plain
        self._stack = AsyncExitStack()
        self._client: CrewClient | None = None

    async def __aenter__(self) -> CrewSession:
        self._stack.enter_context(self._withhold)
        self._client = await self._stack.enter_async_context(self._connect(self.crew))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def client(self) -> CrewClient:
        """The client with the newest token."""
        if self._client is None:
            raise InvalidCallError("This CrewSession is not open: use it in `async with CrewSession(crew) as session`.")
        return self._client

    async def renew(self) -> bool:
        """Take up the token that the stored block has now; False if that is the one that was refused."""
        try:
            fresh = await self.crew.reloaded()
            if fresh is None:
                return False
            client = await self._stack.enter_async_context(self._connect(fresh))
        except (httpx.HTTPError, PrefectException, ValueError):
            return False
        self.crew, self._client = fresh, client
        return True

    async def asked(self, call: Callable[[CrewClient], Awaitable[T]]) -> T:
        """Make a call, and once more with the stored block's token where this one is refused.

        Only for calls that a refusal leaves undone, which all of them are.
        """
        try:
            return await call(self.client)
        except AuthenticationError:
            if not await self.renew():
                raise
        return await call(self.client)


def _plain(crew: DeployedCrew) -> CrewClient:
    return crew.client()
