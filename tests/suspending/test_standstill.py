"""When a flow run may be suspended: not while anything works, and all branches together."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prefect_crew.suspending.standstill import Standstill, branch_here, standstill_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def standstill(clock: Clock) -> Standstill:
    return Standstill(see_first=3.0, clock=clock)


def test_a_branch_leaves_after_some_quiet_seconds(standstill: Standstill, clock: Clock):
    with standstill.wait() as branch:
        assert not branch.may_leave()
        clock.now += 2.9
        assert not branch.may_leave()
        clock.now += 0.2
        assert branch.may_leave()


def test_the_oldest_question_comes_first(standstill: Standstill):
    with ExitStack() as stack:
        branches = [stack.enter_context(standstill.wait()) for _ in range(3)]
        newer, older = SimpleNamespace(since=2), SimpleNamespace(since=1)
        branches[0].form, branches[2].form = cast("Any", newer), cast("Any", older)
        assert standstill.forms() == [older, newer]


def test_work_beside_it_keeps_a_branch_from_leaving_and_its_end_begins_the_count_anew(
    standstill: Standstill, clock: Clock
):
    with ExitStack() as stack:
        with standstill.work():
            clock.now += 10
            # Another call's work must not be counted as resting because of this wait.
        work = stack.enter_context(ExitStack())
        work.enter_context(standstill.work())
        clock.now += 100
        assert not standstill.quiet
        work.close()
        assert not standstill.quiet
        clock.now += 3
        assert standstill.quiet


def test_the_work_that_a_wait_is_part_of_rests_meanwhile(standstill: Standstill, clock: Clock):
    with standstill.work(), standstill.work():
        with standstill.wait() as branch:
            clock.now += 3
            assert branch.may_leave()
            assert branch_here() is branch
        clock.now += 3
        assert not standstill.quiet
        assert branch_here() is None
    clock.now += 3
    assert standstill.quiet


def test_one_branch_alone_suspends_the_flow_run(standstill: Standstill, clock: Clock):
    with standstill.wait() as branch:
        clock.now += 3
        standstill.left(branch)
        assert standstill.verdict(branch) is True


def test_the_last_of_several_branches_has_it_suspended_by_one(standstill: Standstill, clock: Clock):
    with standstill.wait() as first, standstill.wait() as second:
        clock.now += 3
        standstill.left(first)
        assert standstill.verdict(first) is None
        standstill.left(second)
        assert [standstill.verdict(first), standstill.verdict(second)] == [True, None]


@pytest.mark.parametrize("what", ["work", "an end"])
def test_a_branch_goes_back_to_its_wait_when_something_else_happens(what: str, standstill: Standstill, clock: Clock):
    with standstill.wait() as first, ExitStack() as other:
        other.enter_context(standstill.wait())
        clock.now += 3
        standstill.left(first)
        clock.now += 0.1
        if what == "work":
            other.enter_context(standstill.work())
        else:
            other.close()
        assert standstill.verdict(first) is False
        standstill.back(first)
        assert first.ready_at is None


def test_it_is_one_for_each_attempt_of_a_flow_run():
    assert standstill_of("a", 1) is standstill_of("a", 1)
    assert standstill_of("a", 1) is not standstill_of("a", 2)
