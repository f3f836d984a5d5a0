"""Leaving a wait: two looks close together, one before and one after who waits is written down, and no more."""

from __future__ import annotations

from typing import Any, cast

import pytest

from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.suspending import leaving as module
from prefect_crew.suspending.leaving import Leaving
from prefect_crew.suspending.suspension import StillRunningError
from prefect_crew.waiting import Phases, WaitPolicy


class Branch:
    free = True
    seconds: float | None = None
    form: Any = None

    def may_leave(self) -> bool:
        return self.free


class Form:
    question = object()


class Run:
    kickoff_id = "k"
    record = object()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What writing down who waits comes to, one after the other; True once it is empty."""
    outcomes: list[bool] = []

    async def write_down(*_: Any, **__: Any) -> bool:
        return outcomes.pop(0) if outcomes else True

    monkeypatch.setattr(module, "write_down", write_down)
    return outcomes


def leaving(branch: Branch, *, asks: bool = False) -> Leaving:
    return Leaving(cast("Any", branch), cast("Any", Run()), WaitPolicy(mode="suspend"), "flow-run", asks=asks)


async def looks(wait: Leaving, state: CrewState, *, form: Any = None, pause: float = 0.6, most: int = 5) -> list[bool]:
    """Look until the wait is left or `most` times; return for each pause before a look whether it ended early."""
    early: list[bool] = []
    slept = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        await module.asyncio.sleep(seconds / 20)

    pausing = wait.pausing(sleep, lambda: False)
    for _ in range(most):
        await wait.saw(CrewStatus(kickoff_id="k", state=state), Phases(kicked_off_at=0.0), form)
        slept = 0.0
        await pausing(pause / 10)
        early.append(slept == 0.0)
    return early


async def test_it_is_left_after_a_look_that_follows_the_note(written: list[bool]):
    with pytest.raises(StillRunningError):
        await looks(leaving(Branch()), CrewState.RUNNING)


async def test_it_is_not_left_while_something_else_works(written: list[bool]):
    branch = Branch()
    branch.free = False
    assert await looks(leaving(branch), CrewState.RUNNING) == [False] * 5


@pytest.mark.parametrize("state", [CrewState.WAITING, CrewState.UNKNOWN])
async def test_what_is_seen_to_the_end_here_is_looked_at_no_more_often(state: CrewState, written: list[bool]):
    assert await looks(leaving(Branch(), asks=True), state) == [False] * 5


async def test_a_question_is_left_to_a_form(written: list[bool]):
    branch, form = Branch(), Form()
    with pytest.raises(StillRunningError):
        await looks(leaving(branch, asks=True), CrewState.WAITING, form=form)
    assert branch.form is form


async def test_what_was_written_down_about_one_question_does_not_do_for_the_next(written: list[bool]):
    branch = Branch()
    wait = leaving(branch, asks=True)
    for form in (Form(), None, Form()):
        question = CrewState.RUNNING if form is None else CrewState.WAITING
        if form is not None:
            form.question = object()
        assert len(await looks(wait, question, form=form, most=1)) == 1
    with pytest.raises(StillRunningError):
        await looks(wait, CrewState.WAITING, form=form, most=1)


async def test_a_prefect_api_that_is_away_makes_no_hot_loop(written: list[bool]):
    written += [False, False, False]
    assert await looks(leaving(Branch()), CrewState.RUNNING, most=3) == [False] * 3
