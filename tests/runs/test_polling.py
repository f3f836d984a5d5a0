"""The wait loop, on a clock of its own: a day passes in a millisecond."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy, fast_polling
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewConnectionError,
    CrewError,
    CrewLostError,
    CrewTimeoutError,
    NotFoundError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
)
from prefect_crew.runs.polling import Phases, Watcher, poll, poll_delays
from prefect_crew.states import CrewState

PENDING, RUNNING, WAITING = CrewState.PENDING, CrewState.RUNNING, CrewState.WAITING
COMPLETED, UNKNOWN = CrewState.COMPLETED, CrewState.UNKNOWN

Seen = CrewState | CrewError
STEADY = WaitPolicy(initial=10, factor=1, max_interval=10, jitter=0, timeout=None, human_timeout=None)
"""Looks each ten seconds and has no limit but those that a test sets."""


def broken(status: int = 500, retry_after: float | None = None) -> CrewError:
    facts = {"status_code": status, "method": "GET", "path": "/status/r1"}
    if status == 429:
        return RateLimitedError(retry_after=retry_after, **facts)
    return ServerError(retry_after=retry_after, **facts)


REFUSED = AuthenticationError(status_code=401, method="GET", path="/status/r1")
LOST_CONNECTION = CrewConnectionError(method="GET", url="https://crew.test/status/r1", reason="reset", sent=True)


@dataclass
class World(Watcher):
    """A run whose state is a function of the time, a clock that only pauses move, and all that the watcher gets."""

    at: Callable[[float], Seen]
    started: float = 1_000_000.0
    time: float = 1_000_000.0
    looks: list[float] = field(default_factory=list)
    saw_states: list[CrewState] = field(default_factory=list)
    human_waits: list[bool] = field(default_factory=list)
    troubles: int = 0
    stops: str | None = None

    def now(self) -> float:
        return self.time

    async def pause(self, seconds: float) -> None:
        assert seconds >= 0
        assert len(self.looks) < 20_000, "the loop spins"
        self.time += seconds

    async def look(self) -> CrewStatus:
        self.looks.append(self.time - self.started)
        seen = self.at(self.time - self.started)
        if isinstance(seen, CrewError):
            raise seen
        return CrewStatus(kickoff_id="r1", state=seen)

    async def on_status(self, status: CrewStatus) -> None:
        self.saw_states.append(status.state)

    async def on_human_wait(self, phases: Phases) -> None:
        self.human_waits.append(phases.human_since is not None)

    async def on_error(self, error: CrewError) -> None:
        self.troubles += 1

    async def stop(self, phase: str) -> bool:
        return phase == self.stops

    async def wait(self, policy: WaitPolicy = STEADY, *, phases: Phases | None = None, **options: object) -> CrewStatus:
        return await poll(
            self.look,
            kickoff_id="r1",
            crew="travel",
            idempotency_key="key-1",
            policy=policy,
            phases=phases or Phases(kicked_off_at=self.started),
            watcher=self,
            now=self.now,
            **{"rng": lambda: 0.5, **options},
        )


def steps(*until: tuple[float, Seen], then: Seen = COMPLETED) -> Callable[[float], Seen]:
    """Return a run that is in each state until that many seconds after the kickoff."""

    def at(seconds: float) -> Seen:
        return next((seen for end, seen in until if seconds < end), then)

    return at


def each(seen: Sequence[Seen]) -> Callable[[float], Seen]:
    """Return a run that answers each look with the next of `seen`, and stays with the last."""
    left: Iterator[Seen] = itertools.chain(seen, itertools.repeat(seen[-1]))
    return lambda _: next(left)


# The schedule


def test_pauses_grow_by_the_factor_up_to_the_cap():
    policy = WaitPolicy(initial=1, factor=2, max_interval=5, jitter=0)
    assert list(itertools.islice(poll_delays(policy), 5)) == [1, 2, 4, 5, 5]


@given(
    initial=st.floats(0.01, 10),
    factor=st.floats(1, 5),
    room=st.floats(1, 100),
    jitter=st.floats(0, 0.99),
    rng=st.lists(st.floats(0, 1, exclude_max=True), min_size=20, max_size=20),
)
def test_a_pause_never_leaves_its_bounds(initial: float, factor: float, room: float, jitter: float, rng: list[float]):
    policy = WaitPolicy(initial=initial, factor=factor, max_interval=initial * room, jitter=jitter)
    delays = list(itertools.islice(poll_delays(policy, iter(rng).__next__), 20))
    smooth = list(itertools.islice(poll_delays(policy.model_copy(update={"jitter": 0.0})), 20))
    for delay, middle in zip(delays, smooth, strict=True):
        assert delay > 0
        assert middle * (1 - jitter) * 0.999 <= delay <= middle * (1 + jitter) * 1.001
        assert middle <= policy.max_interval


def test_the_first_pause_may_be_longer_than_all_later_ones():
    policy = WaitPolicy(initial=60, max_interval=5, jitter=0)
    assert list(itertools.islice(poll_delays(policy), 3)) == [60, 5, 5]


def test_by_default_an_end_is_seen_within_a_second_and_a_tenth_of_the_runs_time():
    policy = WaitPolicy().model_copy(update={"jitter": 0.0})
    looks = list(itertools.takewhile(lambda at: at < 300, itertools.accumulate(poll_delays(policy))))
    assert all(after - before <= 1 + before / 10 + 1e-9 for before, after in itertools.pairwise(looks))
    assert len([at for at in looks if at < 60]) <= 25


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError):
        WaitPolicy(intervall=3)  # pyright: ignore[reportCallIssue]


async def test_fast_polling_overrides_every_policy_only_while_it_is_open():
    with fast_polling(0.25):
        quick = World(steps((1, RUNNING)))
        await quick.wait()
    assert quick.looks == [0.25, 0.5, 0.75, 1.0]
    slow = World(steps((1, RUNNING)))
    await slow.wait()
    assert slow.looks == [10]


async def test_the_first_look_comes_after_the_initial_pause_and_at_once_for_a_run_that_was_found():
    started, found = World(each([COMPLETED])), World(each([COMPLETED]))
    await started.wait()
    await found.wait(first_look=True)
    assert (started.looks, found.looks) == ([10], [0])


@pytest.mark.parametrize(("passed", "looks"), [(0, 10), (4, 6), (10, 0), (3600, 0), (-5, 10)], ids=str)
async def test_the_first_pause_is_counted_from_the_kickoff(passed: float, looks: float):
    world = World(each([COMPLETED]))
    await world.wait(phases=Phases(kicked_off_at=world.started - passed))
    assert world.looks == [looks]


async def test_a_change_of_state_makes_it_look_often_again():
    policy = STEADY.model_copy(update={"initial": 1.0, "factor": 3.0})
    world = World(steps((14, PENDING), (30, RUNNING)))
    await world.wait(policy)
    assert world.looks == [1, 4, 13, 23, 24, 27, 36]


# Ends


@pytest.mark.parametrize("end", [COMPLETED, CrewState.FAILED, CrewState.STOPPED], ids=str)
async def test_whichever_end_it_is_it_is_returned(end: CrewState):
    world = World(steps((25, RUNNING), then=end))
    assert (await world.wait()).state is end
    assert world.saw_states == [RUNNING, RUNNING, end]


async def test_an_end_counts_although_the_clock_has_run_out():
    world = World(each([COMPLETED]))
    status = await world.wait(
        STEADY.model_copy(update={"timeout": 5.0}), phases=Phases(kicked_off_at=world.started - 3600), first_look=True
    )
    assert status.state is COMPLETED


# Budgets


async def test_the_last_look_falls_on_the_end_of_the_budget():
    world = World(each([RUNNING]))
    with pytest.raises(CrewTimeoutError) as caught:
        await world.wait(STEADY.model_copy(update={"timeout": 25.0}))
    assert world.looks == [10, 20, 25]
    error = caught.value
    assert (error.phase, error.budget, error.last_state, error.stopped) == ("running", 25, "running", False)
    assert "Run r1 of crew travel was still running" in str(error)
    assert "run again with idempotency key 'key-1'" in str(error)


@pytest.mark.parametrize("phase", ["running", "human"])
async def test_an_error_about_a_budget_says_whether_the_crew_was_stopped(phase: str):
    world = World(each([RUNNING]), stops=phase)
    with pytest.raises(CrewTimeoutError) as caught:
        await world.wait(STEADY.model_copy(update={"timeout": 25.0}))
    assert caught.value.stopped is (phase == "running")


async def test_people_may_get_more_time():
    world = World(steps((300, WAITING)))
    given = iter([100.0, 100.0, 0.0])

    async def more_time() -> float:
        return next(given)

    world.more_time = more_time
    with pytest.raises(CrewTimeoutError, match="human time limit of 50 s"):
        await world.wait(STEADY.model_copy(update={"human_timeout": 50.0}))
    assert world.looks[-1] == 260, "seen from 10 on"


async def test_timeout_is_pending_and_running_together():
    world = World(steps((20, PENDING), then=RUNNING))
    with pytest.raises(CrewTimeoutError, match="running time limit of 30 s"):
        await world.wait(STEADY.model_copy(update={"timeout": 30.0}))
    assert world.looks[-1] == 30


async def test_pending_has_a_limit_of_its_own():
    policy = STEADY.model_copy(update={"timeout": 1000.0, "pending_timeout": 15.0})
    with pytest.raises(CrewTimeoutError, match="pending time limit of 15 s"):
        await World(each([PENDING])).wait(policy)
    world = World(steps((12, PENDING), (900, RUNNING)))
    assert (await world.wait(policy)).state is COMPLETED


async def test_budgets_are_counted_from_the_recorded_kickoff():
    world = World(each([RUNNING]))
    with pytest.raises(CrewTimeoutError):
        await world.wait(
            STEADY.model_copy(update={"timeout": 100.0}),
            phases=Phases(kicked_off_at=world.started - 95),
            first_look=True,
        )
    assert world.looks == [0, 5]


async def test_a_persons_time_costs_only_from_their_own_budget():
    policy = STEADY.model_copy(update={"timeout": 60.0, "human_timeout": 5000.0})
    world = World(steps((30, RUNNING), (4030, WAITING), (4050, RUNNING)))
    assert (await world.wait(policy)).state is COMPLETED
    assert world.human_waits == [True, False]


async def test_people_have_one_budget_for_all_their_rounds():
    policy = STEADY.model_copy(update={"human_timeout": 100.0})
    world = World(steps((10, RUNNING), (80, WAITING), (100, RUNNING), then=WAITING))
    with pytest.raises(CrewTimeoutError) as caught:
        await world.wait(policy)
    assert (caught.value.phase, caught.value.budget) == ("human", 100)
    # The first round was seen from 10 to 80, so 30 seconds were left of the second, which was seen from 100.
    assert world.looks[-1] == 130


async def test_a_turn_that_began_before_a_restart_goes_on():
    phases = Phases(kicked_off_at=1_000_000 - 500, human_seconds=20, human_since=1_000_000 - 70)
    world = World(each([WAITING]))
    with pytest.raises(CrewTimeoutError, match="human time limit of 100 s"):
        await world.wait(STEADY.model_copy(update={"human_timeout": 100.0}), phases=phases, first_look=True)
    assert world.looks == [0, 10]
    assert world.human_waits == [], "no wait for a person began or ended"


async def test_a_persons_turn_that_ends_with_the_run_is_no_news_and_counts():
    world = World(each([WAITING, COMPLETED]))
    phases = Phases(kicked_off_at=world.started)
    await world.wait(phases=phases)
    assert (world.human_waits, phases.human_seconds) == ([True], 10)


async def test_without_limits_it_waits_for_ever():
    world = World(steps((86_400, RUNNING)))
    assert (await world.wait()).state is COMPLETED


@given(
    states=st.lists(
        st.tuples(st.floats(0.5, 500), st.sampled_from([PENDING, RUNNING, WAITING])), min_size=1, max_size=6
    ),
    timeout=st.floats(1, 2000),
    human=st.floats(1, 2000),
    interval=st.floats(5, 60),
)
async def test_no_wait_outlives_its_budgets(
    states: list[tuple[float, CrewState]], timeout: float, human: float, interval: float
):
    ends = list(itertools.accumulate(seconds for seconds, _ in states))
    world = World(steps(*zip(ends, (state for _, state in states), strict=True)))
    policy = WaitPolicy(
        initial=interval, factor=1, max_interval=interval, jitter=0, timeout=timeout, human_timeout=human
    )
    with contextlib.suppress(CrewTimeoutError):
        await world.wait(policy)
    assert world.looks[-1] <= timeout + human + 1


# Trouble


@pytest.mark.parametrize(
    "error",
    [
        broken(500),
        broken(503),
        LOST_CONNECTION,
        ResponseFormatError(expected="a status", body="<html>"),
        NotFoundError(status_code=405, method="GET", path="/status/r1"),
    ],
    ids=["500", "503", "connection", "html", "405"],
)
async def test_an_error_of_a_look_says_nothing_about_the_run(error: CrewError):
    world = World(each([error, error, RUNNING, error, COMPLETED]))
    assert (await world.wait()).state is COMPLETED
    assert world.troubles == 3


async def test_errors_have_a_budget_of_their_own_which_a_good_answer_refills():
    policy = STEADY.model_copy(update={"error_timeout": 60.0})
    world = World(steps((55, broken()), (70, RUNNING), (125, broken()), (140, RUNNING)))
    assert (await world.wait(policy)).state is COMPLETED
    failing = World(each([RUNNING, LOST_CONNECTION]))
    with pytest.raises(CrewConnectionError):
        await failing.wait(policy)
    assert failing.looks[-1] == 80, "one good answer at 10, and failures from 20 on"


async def test_retry_after_is_obeyed_up_to_a_cap():
    world = World(each([broken(429, 77), broken(503, 42), broken(429, 86_400), COMPLETED]))
    await world.wait()
    assert world.looks == [10, 87, 129, 429]


async def test_too_many_requests_cost_nothing():
    world = World(steps((3000, broken(429)), then=COMPLETED))
    assert (await world.wait(STEADY.model_copy(update={"error_timeout": 60.0}))).state is COMPLETED


async def test_the_time_of_429s_between_failures_costs_nothing_either():
    policy = STEADY.model_copy(update={"error_timeout": 60.0})
    world = World(steps((25, broken(500)), (900, broken(429)), (925, broken(500))))
    assert (await world.wait(policy)).state is COMPLETED


async def test_a_budget_that_ends_amid_failures_waits_for_an_answer_for_the_time_of_errors():
    policy = STEADY.model_copy(update={"timeout": 100.0, "error_timeout": 50.0})
    back = World(steps((85, RUNNING), (120, broken(429)), then=COMPLETED))
    assert (await back.wait(policy)).state is COMPLETED
    away = World(steps((85, RUNNING), then=broken(429)))
    with pytest.raises(CrewTimeoutError) as caught:
        await away.wait(policy)
    assert away.looks[-1] == 150
    assert isinstance(caught.value.__cause__, RateLimitedError)


async def test_a_restart_after_the_budget_does_not_give_up_at_the_first_failure():
    world = World(each([broken(), LOST_CONNECTION, COMPLETED]))
    status = await world.wait(
        STEADY.model_copy(update={"timeout": 60.0}), phases=Phases(kicked_off_at=world.started - 7200), first_look=True
    )
    assert status.state is COMPLETED


async def test_what_no_later_look_can_change_is_raised_at_once():
    world = World(each([ConfigurationError("the id makes no URL")]))
    with pytest.raises(ConfigurationError):
        await world.wait()
    assert len(world.looks) == 1


# Tokens


async def test_a_refused_token_ends_the_wait():
    world = World(each([RUNNING, REFUSED]))
    with pytest.raises(AuthenticationError):
        await world.wait()


# Runs that the server does not know


async def test_an_unknown_run_is_waited_for_in_its_grace():
    policy = STEADY.model_copy(update={"grace": 60.0})
    world = World(steps((55, UNKNOWN), (70, RUNNING)))
    assert (await world.wait(policy)).state is COMPLETED
    never = World(each([UNKNOWN]))
    with pytest.raises(CrewLostError) as caught:
        await never.wait(policy)
    assert never.looks[-1] == 60
    assert caught.value.last_state is None
    assert "this wait never saw it" in str(caught.value)


async def test_a_run_that_was_seen_alive_is_lost_at_the_second_unknown():
    world = World(each([RUNNING, UNKNOWN, RUNNING, UNKNOWN, UNKNOWN]))
    with pytest.raises(CrewLostError) as caught:
        await world.wait(STEADY.model_copy(update={"grace": 3600.0}))
    assert len(world.looks) == 5
    assert caught.value.last_state == "running"


async def test_an_old_run_that_is_found_again_gets_a_second_look_before_it_is_lost():
    old = Phases(kicked_off_at=1_000_000 - 7200)
    world = World(each([UNKNOWN, COMPLETED]))
    assert (await world.wait(phases=old, first_look=True)).state is COMPLETED
    with pytest.raises(CrewLostError):
        await World(each([UNKNOWN])).wait(phases=Phases(kicked_off_at=1_000_000 - 7200), first_look=True)


async def test_an_unknown_run_is_not_shown_as_seen():
    world = World(each([UNKNOWN, COMPLETED]))
    await world.wait()
    assert world.saw_states == [COMPLETED]
