"""Random sequences of public calls against a real crew's server and a real Prefect server, beside a small model.

A key may have one run, one more for each that failed or was stopped up to `max_attempts`, and one more for each kickoff
of which a person said that it never started. What has completed stays so, under the same id.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from outcomes.driver import Command, World
from prefect_crew import (
    CrewAPIError,
    CrewError,
    CrewFailedError,
    CrewInput,
    CrewResult,
    CrewStoppedError,
    CrewTimeoutError,
    IdempotencyConflictError,
    KickoffUncertainError,
    WaitPolicy,
    aget_result,
    arun_crew,
    stop_crew,
)
from prefect_crew.devserver import CrewServer, Outcome, ProgramError, Run

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.timeout(3000)]

MAX_ATTEMPTS = 2
KEYS = ("a", "b", "c", "d")
BRIEFLY = WaitPolicy(initial=0.05, max_interval=0.1, timeout=0.7)
PATIENTLY = WaitPolicy(initial=0.05, max_interval=0.1, timeout=60)


class Obedient:
    """A crew that returns its input, unless the next run of that input is to fail, or to go on until it is released."""

    name = "obedient"

    def __init__(self) -> None:
        self.fails, self.held = set[str](), set[str]()

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="text")]

    async def execute(self, run: Run) -> Outcome:
        text = str(run.inputs["text"])
        while text in self.held:
            await asyncio.sleep(0.02)
        if text in self.fails:
            self.fails.discard(text)
            raise ProgramError("as it was told")
        return Outcome(output=text)


@dataclass
class Model:
    """What may be true of a key. `state`: new, uncertain, flying, failed, stopped, or completed."""

    state: str = "new"
    counted: int = 0
    """Attempts that started a run, or may have."""
    never_started: int = 0
    run: str | None = None
    lost_at: float = 0.0

    def is_(self, wanted: str) -> bool:
        """Whether it is in a state, or the next call "starts" a run."""
        return self.starts if wanted == "starts" else self.state == wanted

    @property
    def starts(self) -> bool:
        """Whether the next call sends a kickoff."""
        return self.state == "new" or (self.state in ("failed", "stopped") and self.counted < MAX_ATTEMPTS)


def for_one(wanted: str) -> Any:
    """Return a precondition: some key is in a state, or "starts"."""
    return precondition(lambda self: any(model.is_(wanted) for model in self.models.values()))


class Calls(RuleBasedStateMachine):
    """Calls of four keys in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.program = Obedient()
        self.server = CrewServer(self.program)
        self.server.start()
        self.folder = tempfile.TemporaryDirectory()
        self.world = World(self.server, Path(self.folder.name))
        self.models = {key: Model() for key in KEYS}
        self.resolved, self.said = 0, False

    def teardown(self) -> None:
        self.program.held.clear()
        self.server.stop()
        self.folder.cleanup()

    # What happens

    def call(self, key: str, *, at_once: int = 1, text: str | None = None, wait: WaitPolicy = PATIENTLY) -> list[Any]:
        """Call `run_crew` with a key, several times at once if so, and return what each returned or raised."""
        block = self.world.crew(max_attempts=MAX_ATTEMPTS)

        async def calls() -> list[Any]:
            one: Callable[[], Any] = lambda: arun_crew(  # noqa: E731
                block, {"text": text or key}, idempotency_key=self.world.key(key), wait=wait
            )
            return await asyncio.gather(*(one() for _ in range(at_once)), return_exceptions=True)

        return asyncio.run(calls())

    def accepted(self, key: str) -> list[str]:
        """Return the ids of the runs that were started under a key."""
        return [id_ for id_, meta in self.server.accepted.items() if meta["idempotency_key"] == self.world.key(key)]

    def posts(self) -> int:
        return self.server.requests["kickoff"]

    def check(self, key: str, outcomes: list[Any], *, posts: int, more: int) -> None:
        """Compare what calls gave with the model, `more` kickoffs being expected, and take over what they saw."""
        model = self.models[key]
        assert self.posts() - posts == more, f"{self.posts() - posts} requests POST /kickoff"
        if model.starts:
            model.counted, model.run, model.state = model.counted + 1, self.accepted(key)[-1], "flying"
        for outcome in outcomes:
            self.check_one(key, outcome)

    def check_one(self, key: str, outcome: Any) -> None:
        model = self.models[key]
        if model.state == "uncertain":
            assert isinstance(outcome, KickoffUncertainError), repr(outcome)
            assert str(self.world.key(key)) in str(outcome)
            return
        assert model.run is not None
        state = str(self.server.run(model.run).state)
        expected = {"completed": CrewResult, "failed": CrewFailedError, "stopped": CrewStoppedError}
        assert isinstance(outcome, expected.get(state, CrewTimeoutError)), f"{state}: {outcome!r}"
        assert outcome.kickoff_id == model.run
        model.state = state if state in expected else "flying"

    def play(self, key: str, *, at_once: int = 1, more: int | None = None) -> None:
        """Call and check; `more` kickoffs are expected where the call starts a run, else none."""
        posts, starts = self.posts(), self.models[key].starts
        wait = BRIEFLY if key in self.program.held else PATIENTLY
        expected = 0 if not starts else 1 if more is None else more
        self.check(key, self.call(key, at_once=at_once, wait=wait), posts=posts, more=expected)

    def one(self, key: str, wanted: str) -> tuple[str, Model]:
        """Return a key of which that is true, this one if possible, and its model."""
        keys = (key, *KEYS)
        return next((name, self.models[name]) for name in keys if self.models[name].is_(wanted))

    # Rules

    @for_one("uncertain")
    @rule(key=st.sampled_from(KEYS), at_once=st.integers(1, 2))
    def call_what_is_uncertain(self, key: str, at_once: int) -> None:
        self.play(self.one(key, "uncertain")[0], at_once=at_once)

    @rule(key=st.sampled_from(KEYS))
    def start(self, key: str) -> None:
        self.play(key)

    @rule(key=st.sampled_from(KEYS), at_once=st.integers(2, 4))
    def start_at_once(self, key: str, at_once: int) -> None:
        model = self.models[key]
        self.program.fails.discard(key)
        if model.state == "flying" and model.run and str(self.server.run(model.run).state) == "failed":
            at_once = 1  # one that asks after another has read the failure starts another run, and may
        self.play(key, at_once=at_once)

    @for_one("starts")
    @rule(key=st.sampled_from(KEYS), times=st.integers(1, 2), at_once=st.integers(1, 2))
    def start_at_a_busy_server(self, key: str, times: int, at_once: int) -> None:
        key, _ = self.one(key, "starts")
        self.program.fails.discard(key)
        self.server.faults.add(f"kickoff:429=0.1@1-{times}")
        self.play(key, at_once=at_once, more=times + 1)
        self.server.faults.clear()

    @for_one("starts")
    @rule(key=st.sampled_from(KEYS), code=st.sampled_from(("400", "401", "422")))
    def start_and_be_refused(self, key: str, code: str) -> None:
        (key, _), posts = self.one(key, "starts"), self.posts()
        self.server.faults.add(f"kickoff:{code}@1")
        (outcome,) = self.call(key)
        self.server.faults.clear()
        assert isinstance(outcome, CrewAPIError), repr(outcome)
        assert self.posts() == posts + 1

    @for_one("starts")
    @rule(
        key=st.sampled_from(KEYS),
        fault=st.sampled_from(("drop", "500", "garbage")),
        when=st.sampled_from(("before", "after")),
    )
    def start_and_lose_the_answer(self, key: str, fault: str, when: str) -> None:
        (key, model), posts = self.one(key, "starts"), self.posts()
        self.server.faults.add(f"kickoff:{fault}-{when}-accept@1")
        (outcome,) = self.call(key)
        self.server.faults.clear()
        assert isinstance(outcome, KickoffUncertainError), repr(outcome)
        assert self.posts() == posts + 1
        model.state, model.counted, model.lost_at = "uncertain", model.counted + 1, time.monotonic()
        model.run = self.accepted(key)[-1] if when == "after" else None

    @rule(key=st.sampled_from(KEYS))
    def the_next_run_fails(self, key: str) -> None:
        self.program.fails.add(key)

    @for_one("starts")
    @rule(key=st.sampled_from(KEYS))
    def hold(self, key: str) -> None:
        key, _ = self.one(key, "starts")
        self.program.held.add(key)
        self.play(key)

    @for_one("flying")
    @rule(key=st.sampled_from(KEYS))
    def release(self, key: str) -> None:
        key, _ = self.one(key, "flying")
        self.program.held.discard(key)
        run = self.models[key].run
        while run is not None and not self.server.run(run).state.ended:
            asyncio.run(asyncio.sleep(0.05))

    @for_one("flying")
    @rule(key=st.sampled_from(KEYS))
    def stop(self, key: str) -> None:
        key, model = self.one(key, "flying")
        if model.run is not None and key in self.program.held:
            stop: Any = stop_crew
            stop(self.world.crew(max_attempts=MAX_ATTEMPTS), model.run)
            assert str(self.server.run(model.run).state) == "stopped"
            model.state = "stopped"
            self.program.held.discard(key)

    @rule(key=st.sampled_from(KEYS))
    def call_with_other_inputs(self, key: str) -> None:
        if self.models[key].counted - self.models[key].never_started:
            posts = self.posts()
            (outcome,) = self.call(key, text="something else")
            assert isinstance(outcome, IdempotencyConflictError), repr(outcome)
            assert self.posts() == posts

    @rule(key=st.sampled_from(KEYS))
    def read_the_result(self, key: str) -> None:
        try:
            result = asyncio.run(aget_result(str(self.world.key(key))))
        except CrewError:
            assert self.models[key].state != "completed"
            return
        assert result.kickoff_id == self.models[key].run
        assert str(self.server.run(result.kickoff_id).state) == "completed"

    @for_one("uncertain")
    @rule(key=st.sampled_from(KEYS))
    def say_too_early_that_it_never_started(self, key: str) -> None:
        key, model = self.one(key, "uncertain")
        if time.monotonic() - model.lost_at < 10 and not self.said:  # later it would be in time
            self.said = True
            asyncio.run(Command("runs resolve {key} --never-started --yes", 1, key=key).play(self.world))

    @precondition(lambda self: self.resolved < 1)
    @for_one("uncertain")
    @rule(key=st.sampled_from(KEYS))
    def resolve(self, key: str) -> None:
        key, model = self.one(key, "uncertain")
        outcome = f"--kickoff-id {model.run} --crew" if model.run else "--never-started --yes"
        asyncio.run(Command(f"runs resolve {{key}} {outcome}", key=key, waits=True).play(self.world))
        self.resolved += 1
        for one in self.models.values():  # an hour has passed
            one.lost_at = -math.inf
        model.state = "flying" if model.run else "new"
        if model.run is None:
            model.counted, model.never_started = model.counted - 1, model.never_started + 1

    # What always holds

    @invariant()
    def no_key_has_more_runs_than_it_may_have(self) -> None:
        counts: Counter[str] = self.server.kickoffs_by_key
        for key, model in self.models.items():
            assert counts[str(self.world.key(key))] <= model.counted <= MAX_ATTEMPTS


ONCE: dict[str, Any] = {
    "phases": (Phase.explicit, Phase.generate),  # to shrink a failure takes hours at half a second a step
    "suppress_health_check": list(HealthCheck),
}


def test_no_order_of_calls_starts_a_run_too_many() -> None:
    run_state_machine_as_test(Calls, settings=settings(max_examples=5, stateful_step_count=20, **ONCE))


@pytest.mark.slow
def test_no_long_order_of_calls_starts_a_run_too_many() -> None:
    run_state_machine_as_test(Calls, settings=settings(max_examples=8, stateful_step_count=30, **ONCE))
