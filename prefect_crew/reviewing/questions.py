"""What a run asks a person: the next question told from the one before, and everybody told of it."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew import reviews
from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.events import emit
from prefect_crew.logs import run_logger
from prefect_crew.records import ReviewStore, SentReview
from prefect_crew.reviews import asked_of, is_late, judged, round_of, waiting_task

if TYPE_CHECKING:
    from prefect_crew.open_runs import OpenRun
    from prefect_crew.wakeups import Waker

__all__ = ["Question", "Questions", "how_to_answer"]


@dataclass(frozen=True)
class Question:
    """What a run asks at this moment, the same object as long as it is the same question.

    `task_id` and `output`, what is to be judged, are the crew's own: they go to the crew and to whoever answers. `task`
    is the task as it may be shown. `round` counts the task's questions from 1; `asked` is the digest that tells it from
    the next; `before` is what was answered already.
    """

    kickoff_id: str
    task_id: str = field(repr=False)
    round: int
    asked: str
    output: str | None = field(repr=False)
    before: tuple[SentReview, ...] = field(default=(), repr=False)
    task: str = ""


def how_to_answer(kickoff_id: str) -> str:
    """Return the commands that answer, for logs, artifacts and events."""
    quoted = shlex.quote(kickoff_id)
    return (
        f"prefect-crew reviews approve {quoted}, or: prefect-crew reviews reject {quoted} --feedback TEXT. "
        "The crew's own page takes answers too."
    )


class Questions:
    """Tells from each status of a run whether a person is asked something, and whether that is new.

    `given` is what people have answered so far, as far as it was looked up.
    """

    def __init__(self, run: OpenRun, records: ReviewStore) -> None:
        self.run = run
        self.waker: Waker | None = None
        self.given: list[SentReview] = []
        self._records = records
        self._open: Question | None = None
        self._answered: tuple[str, float, int] | None = None
        record = run.record
        # Also those that another process has seen.
        self._stale = record is not None and bool(record.human_seconds or record.human_since)

    async def saw(self, status: CrewStatus) -> Question | None:
        """Return what is asked; None if nothing is, or nothing that could be answered.

        An answered question that the server still shows is none. The next round is told from it by another output, by a
        webhook, which says how many answers came before, or by time, since servers move on within seconds.
        """
        waiting = status.state is CrewState.WAITING
        if not waiting:
            self._open, self._answered = None, None
        if self._stale and not waiting:
            await self._look_up()
        task_id = waiting_task(status)
        if not waiting or task_id is None:
            return None
        asked = asked_of(status)
        if self._lingers(asked):
            return None
        open_ = self._open
        if open_ is not None and open_.asked == asked and not self._asked_after(len(open_.before) + 1):
            return open_
        if not await self._look_up():
            return open_
        self._stale = True  # there will be an answer
        if is_late(self.given, task_id, asked) and not self._asked_after(len(self.given)):
            return None
        self._open = Question(
            self.run.kickoff_id,
            task_id,
            round_of(self.given, task_id),
            asked,
            judged(status),
            tuple(self.given),
            task=self.run.named(task_id),
        )
        return self._open

    def answered(self, question: Question) -> None:
        """Note that a question has its answer."""
        self._open = None
        self._answered = (question.asked, time.monotonic(), len(question.before) + 1)

    def forget(self) -> None:
        """Look anew at what is asked: it was answered elsewhere."""
        self._open = None

    def soon(self) -> float | None:
        """Return after how many seconds a look would be welcome, since an answer has just been given; else None."""
        if self._answered is None:
            return None
        since = time.monotonic() - self._answered[1]
        return max(1.0, since) if since < 2 * reviews.SETTLE else None

    def tell(self, question: Question, *, quiet: bool, page: str | None = None, told: bool = False) -> None:
        """Tell automations who is waited for, and people as well unless that is to be `quiet`.

        `page` is where a form waits for the answer; `told`, whether an earlier process has told of it.
        """
        run = self.run
        if run.record is not None:
            run.record.human_task = question.task
        if told:
            return
        if run.record is not None:
            emit(
                "waiting",
                run.record,
                task_id=question.task,
                round=question.round,
                answer=how_to_answer(run.kickoff_id),
                page=page,
            )
        if not quiet:
            run_logger().warning(
                "Crew run %s waits for a person: task %s, round %d. %sprefect-crew reviews show %s has what is to be "
                "judged. Answer: %s",
                run.kickoff_id,
                question.task,
                question.round,
                f"The form is on {page} (Resume). " if page else "",
                shlex.quote(run.kickoff_id),
                how_to_answer(run.kickoff_id),
            )

    async def _look_up(self) -> bool:
        if self.run.record is None:
            return True
        try:
            self.given = await self._records.reviews(self.run.record)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("The answers to run %s could not be read: %s", self.run.kickoff_id, error)
            return False
        self._stale = False
        return True

    def _lingers(self, asked: str) -> bool:
        if self._answered is None:
            return False
        answered, at, answers = self._answered
        return answered == asked and time.monotonic() - at < reviews.SETTLE and not self._asked_after(answers)

    def _asked_after(self, answers: int) -> bool:
        record = self.run.record
        if not answers or record is None or self.waker is None:
            return False
        return self.waker.asked_after(record.attempt, answers)
