"""The wait loop, on a clock of its own: a day passes in a millisecond."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefect_crew as pc
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy, fast_polling
from prefect_crew.runs.polling import Wait, poll_delays
from prefect_crew.states import CrewState

PENDING, RUNNING, WAITING = CrewState.PENDING, CrewState.RUNNING, CrewState.WAITING
COMPLETED, UNKNOWN = CrewState.COMPLETED, CrewState.UNKNOWN

Seen = CrewState | pc.CrewError
STEADY = WaitPolicy(initial=10, factor=1, max_interval=10, jitter=0, timeout=None, human_timeout=None)
"""Looks each ten seconds and has no limit but those that a test sets."""


def broken(status: int = 500, retry_after: float | None = None) -> pc.CrewError:
    return pc.CrewAPIError(f"GET /status/r1 answered {status}", retry_after=retry_after, status_code=status)


REFUSED = pc.AuthenticationError("401", status_code=401)
LOST_CONNECTION = pc.CrewConnectionError("reset", reason="reset", sent=True)


@dataclass
class World(Wait):
    """A run whose state is a function of the time, a clock that only pauses move, and all that the wait gets."""

    at: Callable[[float], Seen]
    started: float = 1_000_000.0
    time: float = 1_000_000.0
    looks: list[float] = field(default_factory=list)
    saw_states: list[CrewState] = field(default_factory=list)
    human_waits: list[bool] = field(default_factory=list)
    troubles: int = 0
    stops: bool = True
    news_at: Sequence[float] = ()
    """When a webhook comes, in seconds from the kickoff."""
    answers: list[float] = field(default_factory=list)
    """When somebody answers, in seconds from the kickoff: the look after it sends the answer."""
    more_time: AsyncMock | None = None

    def now(self) -> float:
        return self.time

    async def pause(self, seconds: float) -> bool:
        assert seconds >= 0
        assert len(self.looks) < 20_000, "the loop spins"
        end = self.time + seconds
        news = next((at for at in self.news_at if self.time < self.started + at < end), None)
        self.time = end if news is None else self.started + news
        return news is not None

    async def look(self) -> CrewStatus:
        self.looks.append(self.time - self.started)
        seen = self.at(self.time - self.started)
        if isinstance(seen, pc.CrewError):
            raise seen
        return CrewStatus(kickoff_id="r1", state=seen)

    async def on_status(self, status: CrewStatus) -> bool:
        self.saw_states.append(status.state)
        sent = [at for at in self.answers if self.started + at <= self.time]
        self.answers = [at for at in self.answers if at not in sent]
        return bool(sent)

    async def end(self, status: CrewStatus) -> None:
        """Write nothing."""

    async def hold_slot(self, *, is_human: bool | None = None) -> None:
        self.human_waits.append(bool(is_human))

    async def on_error(self, error: pc.CrewError) -> None:
        self.troubles += 1

    async def stop(self) -> bool:
        return self.stops

    async def wait(
        self, policy: WaitPolicy = STEADY, *, passed: float | None = None, human: tuple[float, float | None] = (0, None)
    ) -> CrewStatus:
        """Wait for the run from its kickoff on; or from `passed` seconds after it, for a run that was alive."""
        seconds, since = human
        attempt: Any = SimpleNamespace(
            started_at=self.started - (passed or 0),
            human_seconds=seconds,
            human_since=None if since is None else self.started - since,
        )
        names = {"kickoff_id": "r1", "crew": "travel", "idempotency_key": "key-1"}
        run: Any = SimpleNamespace(attempt=attempt, kickoff_id="r1", current_id="r1", names=names)
        Wait.__init__(self, run, policy, is_new=passed is None)
        if self.more_time is not None:
            self.people = cast("Any", SimpleNamespace(more_time=self.more_time, next_pause=lambda delay: delay))
        return await self.until_end()


@pytest.fixture(autouse=True)
def _no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_crew.runs.polling.emit", lambda *_: None)


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


@given(
    initial=st.floats(0.01, 10),
    factor=st.floats(1, 5),
    room=st.floats(1, 100),
    jitter=st.floats(0, 0.99),
)
def test_a_pause_never_leaves_its_bounds(initial: float, factor: float, room: float, jitter: float):
    policy = WaitPolicy(initial=initial, factor=factor, max_interval=initial * room, jitter=jitter)
    delays = list(itertools.islice(poll_delays(policy), 20))
    smooth = list(itertools.islice(poll_delays(policy.model_copy(update={"jitter": 0.0})), 20))
    for delay, middle in zip(delays, smooth, strict=True):
        assert delay > 0
        assert middle * (1 - jitter) * 0.999 <= delay <= middle * (1 + jitter) * 1.001
        assert middle <= policy.max_interval


def test_the_default_sees_an_end_soon():
    policy = WaitPolicy().model_copy(update={"jitter": 0.0})
    looks = list(itertools.takewhile(lambda at: at < 300, itertools.accumulate(poll_delays(policy))))
    assert all(after - before <= 1 + before / 10 + 1e-9 for before, after in itertools.pairwise(looks))
    assert len([at for at in looks if at < 60]) <= 25


async def test_fast_polling_overrides_every_policy():
    world = World(steps((1, RUNNING)))
    with fast_polling(0.25):
        await world.wait()
    assert world.looks == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("passed", "look"), [(0, 10), (4, 6), (3600, 0), (-5, 10)], ids=str)
async def test_the_first_pause_is_counted_from_the_kickoff(passed: float, look: float):
    world = World(each([COMPLETED]))
    world.time += passed
    await world.wait()
    assert world.looks == [passed + look]


@given(
    end=st.floats(1, 3000),
    news=st.lists(st.floats(0.1, 3000), max_size=8),
    initial=st.floats(0.5, 100),
    factor=st.floats(1, 3),
    longest=st.floats(0.5, 100),
)
async def test_webhooks_delay_no_look(end: float, news: list[float], initial: float, factor: float, longest: float):
    policy = STEADY.model_copy(update={"initial": initial, "factor": factor, "max_interval": longest})
    world = World(steps((end, RUNNING)), news_at=sorted(news))
    await world.wait(policy)
    assert world.looks[-1] <= max(initial, end + longest) + 1e-6


async def test_time_asleep_is_no_time_of_errors():
    looks: list[float] = []

    def at(seconds: float) -> Seen:
        looks.append(seconds)
        if len(looks) == 2:
            world.time += 28_800  # it sleeps in the second look
        return broken() if len(looks) < 5 else COMPLETED

    world = World(at)
    await world.wait(STEADY.model_copy(update={"error_timeout": 300.0}))
    assert world.troubles == 4


# Budgets, trouble, and runs that the server does not know


@dataclass
class Case:
    """A run, how it is waited for, and what comes of that. `passed`: seconds from its kickoff to the wait."""

    at: Callable[[float], Seen]
    policy: dict[str, float] = field(default_factory=dict)
    raises: type[pc.CrewError] | None = None
    says: str | None = None
    looks: Sequence[float] | None = None
    news: Sequence[float] = ()
    answers: Sequence[float] = ()
    last_look: float | None = None
    passed: float | None = None
    human: tuple[float, float | None] = (0.0, None)
    human_waits: list[bool] = field(default_factory=list)
    human_seconds: float | None = None


CASES = {
    # When it looks.
    "a change of state resets the pauses": Case(
        steps((14, PENDING), (30, RUNNING)), {"initial": 1.0, "factor": 3.0}, looks=[1, 4, 13, 23, 24, 27, 36]
    ),
    "an answer resets the pauses": Case(
        steps((150, WAITING)), {"initial": 1.0, "factor": 3.0, "max_interval": 30.0}, answers=[95.0],
        looks=[1, 4, 13, 40, 70, 100, 101, 104, 113, 140, 170], human_waits=[True],
    ),
    "a webhook brings a look forward": Case(
        steps((83, RUNNING)), {"initial": 60.0, "max_interval": 5.0}, news=[7.0, 83.0], looks=[7, *range(12, 83, 5), 83]
    ),
    # First the end, then the clock.
    "an end counts although the clock has run out": Case(each([CrewState.FAILED]), {"timeout": 5.0}, passed=3600),
    "the last look falls on the end of the budget, and the error says how to go on": Case(
        each([RUNNING]), {"timeout": 25.0}, pc.CrewTimeoutError,
        "Run r1 of crew travel was still running.*run again with idempotency key 'key-1'", [10, 20, 25],
    ),
    "the timeout is of pending and running together": Case(
        steps((20, PENDING), then=RUNNING), {"timeout": 30.0}, pc.CrewTimeoutError, "running time limit of 30 s",
        last_look=30,
    ),
    "pending has a limit of its own": Case(
        each([PENDING]), {"timeout": 1000.0, "pending_timeout": 15.0}, pc.CrewTimeoutError, "pending time limit of 15 s"
    ),
    "the limit of pending is none of running": Case(
        steps((12, PENDING), (900, RUNNING)), {"timeout": 1000.0, "pending_timeout": 15.0}
    ),
    "budgets are counted from the recorded kickoff": Case(
        each([RUNNING]), {"timeout": 100.0}, pc.CrewTimeoutError, looks=[0, 5], passed=95
    ),
    "without limits it waits for ever": Case(steps((86_400, RUNNING))),
    # People.
    "a person's time costs only from their own budget": Case(
        steps((30, RUNNING), (4030, WAITING), (4050, RUNNING)), {"timeout": 60.0, "human_timeout": 5000.0},
        human_waits=[True, False],
    ),
    # The first round was seen from 10 to 80, so 30 seconds were left of the second, which was seen from 100.
    "people have one budget for all their rounds": Case(
        steps((10, RUNNING), (80, WAITING), (100, RUNNING), then=WAITING), {"human_timeout": 100.0},
        pc.CrewTimeoutError, "human time limit of 100 s", last_look=130, human_waits=[True, False, True],
    ),
    "a turn that began before a restart goes on": Case(
        each([WAITING]), {"human_timeout": 100.0}, pc.CrewTimeoutError, "human time limit of 100 s", [0, 10],
        passed=500, human=(20, 70),
    ),
    "a person's turn may end with the run": Case(each([WAITING, COMPLETED]), human_waits=[True], human_seconds=10),
    # What a look that fails says of the run: nothing.
    **{
        f"a look with {name} says nothing": Case(each([error, error, RUNNING, error, COMPLETED]))
        for name, error in {
            "500": broken(500),
            "lost connection": LOST_CONNECTION,
            "HTML": pc.ResponseFormatError("no status", body="<html>"),
            "405": pc.CrewAPIError("405", status_code=405),
        }.items()
    },
    "a good answer refills the budget of errors": Case(
        steps((55, broken()), (70, RUNNING), (125, broken()), (140, RUNNING)), {"error_timeout": 60.0}
    ),
    "errors end a wait in the end": Case(  # one good answer at 10, and failures from 20 on
        each([RUNNING, LOST_CONNECTION]), {"error_timeout": 60.0}, pc.CrewConnectionError, last_look=80
    ),
    "Retry-After is obeyed up to a cap": Case(
        each([broken(429, 77), broken(503, 42), broken(429, 86_400), COMPLETED]), looks=[10, 87, 129, 429]
    ),
    "too many requests cost nothing, also between failures": Case(
        steps((25, broken(500)), (900, broken(429)), (925, broken(500))), {"error_timeout": 60.0}
    ),
    "a budget that ends amid failures waits for an answer": Case(
        steps((85, RUNNING), (120, broken(429)), then=COMPLETED), {"timeout": 100.0, "error_timeout": 50.0}
    ),
    "but not for longer than errors may take": Case(
        steps((85, RUNNING), then=broken(429)), {"timeout": 100.0, "error_timeout": 50.0}, pc.CrewTimeoutError,
        last_look=150,
    ),
    "a restart after the budget does not give up at the first failure": Case(
        each([broken(), LOST_CONNECTION, COMPLETED]), {"timeout": 60.0}, passed=7200
    ),
    "what no later look can change is raised at once": Case(
        each([pc.ConfigurationError("the id makes no URL")]), raises=pc.ConfigurationError, looks=[10]
    ),
    "a refused token ends the wait": Case(each([RUNNING, REFUSED]), raises=pc.AuthenticationError, looks=[10, 20]),
    # Unknown runs.
    "an unknown run is lost after its grace": Case(
        each([UNKNOWN]), {"grace": 60.0}, pc.CrewLostError, "this call got no status of the run", last_look=60
    ),
    "a run that was seen alive is polled for lost_after": Case(
        each([RUNNING, UNKNOWN, RUNNING, UNKNOWN]), {"lost_after": 60.0}, pc.CrewLostError, "last seen running",
        last_look=100,
    ),
    "a run that is known again is not lost": Case(
        each([RUNNING, UNKNOWN, UNKNOWN, COMPLETED]), {"lost_after": 60.0}, last_look=40,
    ),
    "one unknown answer proves nothing": Case(
        each([RUNNING, UNKNOWN, COMPLETED]), {"lost_after": 0.0}, last_look=30
    ),
    "an old run is polled for lost_after": Case(
        each([UNKNOWN]), {"lost_after": 20.0}, pc.CrewLostError, looks=[0, 10, 20], passed=7200
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_what_comes_of_a_wait(case: Case):
    world = World(case.at, news_at=case.news, answers=[*case.answers])
    waiting = world.wait(STEADY.model_copy(update=case.policy), passed=case.passed, human=case.human)
    if case.raises is None:
        assert (await waiting).state.ended
    else:
        with pytest.raises(case.raises, match=case.says):
            await waiting
    assert case.looks is None or [*case.looks] == world.looks
    assert case.last_look in (None, world.looks[-1])
    assert case.human_waits == world.human_waits
    assert case.human_seconds in (None, world.human_seconds)
    assert UNKNOWN not in world.saw_states


@pytest.mark.parametrize(
    ("on_timeout", "stops", "stopped"), [("stop", True, True), ("stop", False, False), ("leave", True, False)]
)
async def test_a_timeout_says_the_last_state_and_stop(on_timeout: str, stops: bool, stopped: bool):
    world = World(each([RUNNING]), stops=stops)
    with pytest.raises(pc.CrewTimeoutError) as caught:
        await world.wait(STEADY.model_copy(update={"timeout": 25.0, "on_timeout": on_timeout}))
    error = caught.value
    assert (error.phase, error.limit, error.last_state, error.stopped) == ("running", 25, "running", stopped)


async def test_people_may_get_more_time():
    world = World(steps((300, WAITING)), more_time=AsyncMock(side_effect=[100.0, 100.0, 0.0]))
    with pytest.raises(pc.CrewTimeoutError, match="human time limit of 50 s"):
        await world.wait(STEADY.model_copy(update={"human_timeout": 50.0}))
    assert world.looks[-1] == 260, "seen from 10 on"


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
    ends = itertools.accumulate(seconds for seconds, _ in states)
    world = World(steps(*zip(ends, (state for _, state in states), strict=True)))
    limits = {"timeout": timeout, "human_timeout": human}
    policy = STEADY.model_copy(update={"initial": interval, "max_interval": interval, **limits})
    with contextlib.suppress(pc.CrewTimeoutError):
        await world.wait(policy)
    assert world.looks[-1] <= timeout + human + 1
