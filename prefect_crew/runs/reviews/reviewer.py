"""WIP: the interface that a wait needs; the room is being written anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from prefect_crew.client.models import CrewStatus, Review
from prefect_crew.crew import WaitPolicy
from prefect_crew.runs.news import Subscription
from prefect_crew.runs.reviews.questions import ReviewChoice

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun


class People:
    """The questions of one run, and their answers, in one wait."""

    def __init__(
        self,
        run: LiveRun,
        policy: WaitPolicy,
        review: ReviewChoice | None,
        stop: Callable[[], Awaitable[bool]],
        news: Subscription | None = None,
        quiet: bool = False,
    ) -> None:
        self.answers: list[Review] = []
        self.notes: tuple[list[str], list[str]] = ([], [])

    async def see_status(self, status: CrewStatus) -> bool:
        return False

    async def answer(self) -> None: ...

    async def pause(self, pause: Callable[[float], Awaitable[bool]], seconds: float) -> bool:
        return await pause(seconds)

    def next_pause(self, delay: float) -> float:
        return delay

    def has_answered(self) -> bool:
        return False

    async def more_time(self) -> float:
        return 0.0

    async def aclose(self, *, ended: bool) -> None: ...
