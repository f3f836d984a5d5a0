"""Random histories of the real store: callers that freeze, crash and lose answers, a crew, people, webhooks, pruning.

The crew's server and the network are a model with the store's clock: a kickoff arrives within the time that its POST
may take, or never. People tell the truth as the crew's page shows it. What then must be true is checked where it is
decided (a start, an arrival), and of all that is on record after each step.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from prefect_crew.store.attempts import (
    ask_to_stop,
    back_off,
    begin,
    continued,
    ended,
    go_on,
    ids_of,
    list_attempts,
    look,
    not_started,
    resolve,
    started,
    uncertain,
)
from prefect_crew.store.batches import hold_batch, let_go, open_batch, renew_hold
from prefect_crew.store.database import Store
from prefect_crew.store.decision import SEND_WITHIN, STARTS, Allowance, Attempt, AttemptState, Request, Step
from prefect_crew.store.prune import keys_to_prune, prune_keys
from prefect_crew.store.spending import day_of, used
from prefect_crew.store.workers import beat, held_by, hold, take_over
from support.crew_database import Clock, request

S = AttemptState
POST_SECONDS = 30.0
LIMIT, MOST_COST, ESTIMATE, MAX_ATTEMPTS = 2, 2.0, 0.5, 2
DAY = 86_400.0
BOOTS = ["boot 1", "boot 2"]
NEXT = {
    S.POSTING: {S.BACKING_OFF, S.UNCERTAIN, S.NOT_STARTED, S.STARTED},
    S.BACKING_OFF: {S.POSTING, S.UNCERTAIN, S.NOT_STARTED, S.STARTED},
    S.UNCERTAIN: {S.NOT_STARTED, S.STARTED},
    S.NOT_STARTED: {S.STARTED},
    S.STARTED: {S.COMPLETED, S.FAILED, S.STOPPED, S.LOST},
}
"""The states that may follow in one transaction."""


@dataclass(eq=False)
class Caller:
    """A call with a key: in one process, alive until that crashes."""

    process: int
    call: Request
    phase: str = "asks"
    attempt: Attempt | None = None
    looked_at: float = 0.0
    """Right before its last `begin` or `go_on`."""
    kickoff_id: str | None = None

    @property
    def may_send(self) -> bool:
        return self.phase == "has begun"


@dataclass(eq=False)
class Kickoff:
    """A `POST /kickoff` on its way, and the run that it starts."""

    attempt: Attempt
    caller: Caller
    sent_at: float
    state: str = "on its way"
    kickoff_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Machine(RuleBasedStateMachine):
    """One history. A class of its own for each database says how a fresh one is made."""

    make: Callable[[], str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        url = type(self).make() or f"sqlite:///{self.folder}/crew.db"
        self.stores = [Store(url, clock=self.clock) for _ in range(2)]
        self.callers: list[Caller] = []
        self.kickoffs: list[Kickoff] = []
        self.ends: defaultdict[str, int] = defaultdict(int)
        self.stops: defaultdict[str, int] = defaultdict(int)
        self.states: dict[str, AttemptState] = {}
        self.pruned_cost, self.pruned_runs = 0.0, 0
        self.seen: dict[str, Attempt] = {}
        self.last_ids: dict[str, str] = {}
        self.holders: dict[str, str] = {}
        self.batch_owner: str | None = None

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.runner.close()
        shutil.rmtree(self.folder)

    def do(self, process: int, work: Any, *args: Any, **options: Any) -> Any:
        return self.runner.run(self.stores[process].run(work, *args, **options))

    def all_attempts(self) -> list[Attempt]:
        return [*reversed(self.do(0, list_attempts, limit=10_000))]

    def pick(self, chance: Random, items: list[Any]) -> Any:
        return chance.choice(items)

    @rule(seed=st.integers(0, 2**32))
    def something_happens(self, seed: int):
        # One rule with one draw: else Hypothesis would seldom choose what makes up the life of a run, in its order.
        chance = Random(seed)
        phases = {caller.phase for caller in self.callers}
        states = {kickoff.state for kickoff in self.kickoffs}
        on_record = {attempt.state for attempt in self.seen.values()}
        ended_states = {"completed", "failed", "stopped"}
        weights = {
            self.call: 1 if "asks" in phases else 4,
            self.begin: 6 * ("asks" in phases),
            self.send: 12 * ("has begun" in phases),
            self.arrive: 12 * bool(self.on_its_way()),
            self.write_id: 12 * ("has id" in phases),
            self.give_up: 3 * bool(phases & {"has sent", "knows nothing"}),
            self.after_refusal: 4 * bool(phases & {"is refused", "is refused for good", "needs token", "pauses"}),
            self.run_ends: 6 * ("runs" in states),
            self.webhook: bool(states & {"runs", "completed", "failed"}),
            self.poll: 6 * bool(states & ended_states),
            self.cancel: "runs" in states,
            self.a_person_resolves: 3 * bool(on_record & {S.POSTING, S.UNCERTAIN}),
            self.time_passes: 3,
            self.crash: chance.random() < 0.5,
            self.prune: chance.random() < 0.2,
            self.worker_beats: 1,
            self.worker_holds: 1,
            self.worker_takes_over: bool(self.holders),
            self.batch_is_held: 1,
        }
        chance.choice([action for action, weight in weights.items() for _ in range(weight)])(chance)

    # Callers

    def call(self, chance: Random):
        process = chance.randrange(2)
        key = chance.choice("abc")
        session = chance.choice([None, "s"])
        facts: dict[str, Any] = {} if session is None else {"session": session}
        budget = Allowance(scope="budget", per="day", max_cost=MOST_COST, estimate_cost=ESTIMATE)
        call = request(
            f"{key}{session or ''}",
            limit=LIMIT,
            allowances=[budget],
            post_seconds=POST_SECONDS,
            max_attempts=MAX_ATTEMPTS,
            **facts,
        )
        decision = self.do(process, look, call)
        self.callers.append(Caller(process, request(**{**vars(call), "asked_at": decision.now})))

    def begin(self, chance: Random):
        slow = chance.choice([0.0] * 7 + [19.0])
        is_lost = chance.random() < 0.25
        caller = self.pick(chance, [one for one in self.callers if one.phase == "asks"])
        caller.looked_at = self.clock.now
        self.clock.now += slow
        before = self.all_attempts()
        decision = self.do(caller.process, begin, caller.call)
        if decision.step in STARTS:
            self.check_start(caller, decision.attempt, before)
            if not is_lost:
                caller.phase, caller.attempt = "has begun", decision.attempt
        elif decision.step in (Step.REATTACH, Step.RETURN, Step.CONFLICT, Step.STOPPED):
            caller.phase = "is done"
        elif decision.step is Step.UNCERTAIN:
            assert decision.attempt.state in (S.POSTING, S.UNCERTAIN), "its caller surely started nothing"
            assert decision.attempt.owner != caller.call.owner, "this call has sent nothing"

    def check_start(self, caller: Caller, attempt: Attempt, before: list[Attempt]) -> None:
        now, key = self.clock.now, caller.call.key
        is_again = any(one.id == attempt.id for one in before)  # the answer of its earlier `begin` was lost
        for other in self.callers:
            is_in_window = other.may_send and now - other.looked_at < SEND_WITHIN
            assert other is caller or other.call.key != key or not is_in_window, "another caller may still send"
        for kickoff in self.kickoffs:
            if kickoff.attempt.key == key:
                assert kickoff.state not in ("on its way", "runs", "completed"), f"a kickoff of {key} {kickoff.state}"
        bad = [one for one in before if one.key == key and one.state in (S.FAILED, S.STOPPED, S.LOST)]
        assert all((one.ended_at or 0.0) <= (caller.call.asked_at or 0.0) for one in bad), "it waited for that failure"
        today = [self.use_of(one)[1] for one in self.all_attempts() if day_of(one.begun_at) == day_of(now)]
        assert is_again or sum(today) <= MOST_COST + 1e-9
        open_ = [one for one in before if one.ended_at is None and one.id != attempt.id]
        assert is_again or sum(one.counts_until > now for one in open_) < LIMIT
        if (session := attempt.session) is not None:
            turns = [one for one in before if one.session == session and one.id != attempt.id]
            for one in turns:
                is_over = one.state is S.BACKING_OFF and one.is_free(now)
                is_own = one.owner == attempt.owner and one.is_free(now)
                assert one.ended_at is not None or is_over or is_own, f"turn {one.turn} is not over"
                assert is_again or (one.turn or 0) < (attempt.turn or 0)
            done = [one for one in turns if one.state is S.COMPLETED]
            assert attempt.restored == (done[-1].first_id if done else self.last_ids.get(session))

    def send(self, chance: Random):
        caller = self.pick(chance, [one for one in self.callers if one.may_send])
        if self.clock.now - caller.looked_at >= SEND_WITHIN:
            caller.phase = "is done"  # too late; a caller that is polite also says `not_started`
            if chance.random() < 0.25:
                self.do(caller.process, not_started, caller.call.key, caller.call.owner)
            return
        caller.phase = "has sent"
        self.kickoffs.append(Kickoff(caller.attempt, caller, self.clock.now))

    def on_its_way(self) -> list[Kickoff]:
        late = self.clock.now - POST_SECONDS
        for kickoff in self.kickoffs:
            if kickoff.state == "on its way" and kickoff.sent_at < late:
                kickoff.state = "is lost"
        return [one for one in self.kickoffs if one.state == "on its way"]

    def arrive(self, chance: Random):
        answer = chance.choice(["id"] * 6 + ["lost", "429", "429", "401", "422", "dropped"])
        kickoff = self.pick(chance, self.on_its_way())
        caller = kickoff.caller
        is_listening = caller.phase == "has sent"
        if answer in ("id", "lost"):
            kickoff.state = "runs"
            key = kickoff.attempt.key
            others = [one for one in self.kickoffs if one.attempt.key == key and one is not kickoff]
            assert all(one.state not in ("runs", "completed") for one in others), f"{key} runs twice"
            assert self.states.get(kickoff.attempt.id) not in (S.NOT_STARTED, None), "it was resolved too early"
            caller.kickoff_id = kickoff.kickoff_id
        else:
            kickoff.state = "did not start"
        if not is_listening:
            return
        caller.phase = {"id": "has id", "429": "is refused", "401": "needs token", "422": "is refused for good"}.get(
            answer, "knows nothing"
        )

    def write_id(self, chance: Random):
        is_lost = chance.random() < 0.25
        caller = self.pick(chance, [one for one in self.callers if one.phase == "has id"])
        result = self.do(caller.process, started, caller.attempt, caller.kickoff_id, 600.0)
        if result.attempt is None:
            assert caller.attempt.id not in self.states, "only one that was pruned is gone"
            caller.phase = "is done"
            return
        assert (result.attempt.kickoff_id, result.second, result.other_key) == (caller.kickoff_id, None, None)
        caller.phase = "has id" if is_lost else "waits"

    def give_up(self, chance: Random):
        caller = self.pick(chance, [one for one in self.callers if one.phase in ("has sent", "knows nothing")])
        self.do(caller.process, uncertain, caller.attempt, "no answer")
        caller.phase = "is done"

    def after_refusal(self, chance: Random):
        pause = chance.choice([1.0, 100.0])
        refused = ("is refused", "needs", "pauses")
        caller = self.pick(chance, [one for one in self.callers if one.phase.startswith(refused)])
        before = self.clock.now
        match caller.phase:
            case "is refused":
                caller.phase = "pauses" if self.do(caller.process, back_off, caller.attempt, pause) else "is done"
                return
            case "is refused for good":
                self.do(caller.process, not_started, caller.call.key, caller.call.owner)
                caller.phase = "is done"
                return
            case _:  # after a pause, or with a renewed token
                may_send = self.do(caller.process, go_on, caller.attempt, POST_SECONDS)
        caller.phase, caller.looked_at = "has begun" if may_send else "is done", before

    def crash(self, chance: Random):
        process = chance.randrange(2)
        for caller in self.callers:
            if caller.process == process:
                caller.phase = "is dead"
        self.stores[process].close()

    # The crew, its webhooks, people

    def run_ends(self, chance: Random):
        state = chance.choice(["completed", "failed", "stopped"])
        self.pick(chance, [one for one in self.kickoffs if one.state == "runs"]).state = state

    def webhook(self, chance: Random):
        goes_on = chance.random() < 0.25
        kickoff = self.pick(chance, [one for one in self.kickoffs if one.state in ("runs", "completed", "failed")])
        result = self.do(0, started, kickoff.attempt, kickoff.kickoff_id, 600.0)
        if goes_on and kickoff.state == "runs" and result.attempt is not None and result.attempt.state is S.STARTED:
            kickoff.kickoff_id = kickoff.caller.kickoff_id = uuid.uuid4().hex
            self.do(1, continued, kickoff.attempt, kickoff.kickoff_id)

    def poll(self, chance: Random):
        cost = chance.choice([None, 0.1, 0.7])
        kickoff = self.pick(chance, [one for one in self.kickoffs if one.state in ("completed", "failed", "stopped")])
        for process in (0, 1):
            args = (kickoff.attempt, kickoff.kickoff_id, S(kickoff.state))
            self.ends[kickoff.attempt.id] += self.do(process, ended, *args, cost=cost, result="x") is not None
        assert self.ends[kickoff.attempt.id] <= 1

    def cancel(self, chance: Random):
        kickoff = self.pick(chance, [one for one in self.kickoffs if one.state == "runs"])
        if self.do(0, ask_to_stop, kickoff.attempt, "anna"):
            self.stops[kickoff.attempt.id] += 1
            kickoff.state = "stopped"
        assert self.stops[kickoff.attempt.id] <= 1

    def a_person_resolves(self, chance: Random):
        attempt = self.pick(chance, [one for one in self.seen.values() if one.state in (S.POSTING, S.UNCERTAIN)])
        runs = [one for one in self.kickoffs if one.attempt.id == attempt.id and one.state in ("runs", *map(str, S))]
        if runs:
            self.do(0, resolve, attempt, S.STARTED, "anna", kickoff_id=runs[0].kickoff_id, timeout=600.0)
        else:
            self.do(0, resolve, attempt, S.NOT_STARTED, "anna")

    def time_passes(self, chance: Random):
        seconds = chance.choice([0.5] * 8 + [5.0, 5.0, 24.0, 30.0, 61.0, 150.0])
        self.clock.now += seconds

    def prune(self, chance: Random):
        self.clock.now += DAY
        before = self.clock.now - DAY + 1
        keys = self.do(0, keys_to_prune, before)
        self.do(1, prune_keys, keys, before)
        left = {one.id for one in self.all_attempts()}
        for attempt in [one for one in self.seen.values() if one.id not in left]:
            assert attempt.ended_at is not None, "an open attempt was pruned"
            runs, cost = self.use_of(attempt)
            self.pruned_runs, self.pruned_cost = self.pruned_runs + runs, self.pruned_cost + cost
            del self.seen[attempt.id], self.states[attempt.id]
            # Nothing is promised about a key that is pruned, such as to a run that nobody polled.
            self.kickoffs = [one for one in self.kickoffs if one.attempt.id != attempt.id]
        gone = [session for session in self.last_ids if not any(one.session == session for one in self.seen.values())]
        for session in gone:
            del self.last_ids[session]

    # Workers and batches

    def worker_beats(self, chance: Random):
        boot = chance.choice(BOOTS)
        self.do(0, beat, boot, "pool", boot, "host", 30.0)

    def worker_holds(self, chance: Random):
        boot = chance.choice(BOOTS)
        flow_run_id = chance.choice("xy")
        if self.do(0, hold, flow_run_id, boot):
            assert self.holders.setdefault(flow_run_id, boot) == boot

    def worker_takes_over(self, chance: Random):
        boot = chance.choice(BOOTS)
        others = [flow_run_id for flow_run_id, holder in self.holders.items() if holder != boot]
        if took := self.do(0, take_over, boot, 30.0):
            assert took == len(others)
            self.holders |= dict.fromkeys(others, boot)

    def batch_is_held(self, chance: Random):
        owner = chance.choice(["one", "two"])
        lets_go = chance.random() < 0.25
        is_mine = self.do(1, renew_hold, "batch", owner) is not None
        assert is_mine == (self.batch_owner == owner)
        if self.do(0, hold_batch, "batch", owner):
            self.batch_owner = owner
        if lets_go and self.do(0, let_go, "batch", owner):
            self.batch_owner = None

    @initialize()
    def open(self):
        self.do(0, open_batch, "batch", crew_url="u", total=0)

    # What must be true

    def use_of(self, attempt: Attempt) -> tuple[int, float]:
        if attempt.state is S.NOT_STARTED:
            return 0, 0.0
        return 1, ESTIMATE if attempt.cost is None else attempt.cost

    @invariant()
    def all_is_in_order(self):
        attempts = self.all_attempts()
        by_key: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in attempts:
            before = self.states.get(attempt.id)
            assert before in (None, attempt.state) or self.follows(before, attempt.state), (before, attempt.state)
            was = self.seen.get(attempt.id, attempt)
            assert was.first_id in (None, attempt.first_id), "it changed its run"
            self.states[attempt.id] = attempt.state
            self.seen[attempt.id] = attempt
            by_key[attempt.key].append(attempt)
            if attempt.session and attempt.state is S.COMPLETED:
                self.last_ids[attempt.session] = str(attempt.first_id)
        for key, those in by_key.items():
            numbers = [one.number for one in sorted(those, key=lambda one: one.number)]
            assert numbers == [*range(numbers[0], numbers[0] + len(numbers))], key
            assert sum(one.state in (S.POSTING, S.BACKING_OFF, S.UNCERTAIN, S.STARTED) for one in those) <= 1, key
            assert [one.number for one in those if not one.replaced] == [numbers[-1]]
            assert sum(one.state is not S.NOT_STARTED for one in those) <= MAX_ATTEMPTS, key
        for kickoff in self.kickoffs:
            if kickoff.state in ("runs", "completed", "failed", "stopped"):
                on_record = self.seen[kickoff.attempt.id]
                if on_record.kickoff_id is None:
                    assert on_record.state in (S.POSTING, S.UNCERTAIN), f"a run is lost: {on_record}"
                else:
                    assert kickoff.kickoff_id in self.do(0, ids_of, on_record.id)
                    assert on_record.state in (S.STARTED, S.LOST, kickoff.state), "no end that the crew has not told"
        uses = [self.use_of(one) for one in attempts]
        sums = self.do(1, used, "budget")
        assert sums.runs == self.pruned_runs + sum(runs for runs, _ in uses)
        assert sums.cost == pytest.approx(self.pruned_cost + sum(cost for _, cost in uses))
        for boot in BOOTS:
            assert {*self.do(0, held_by, boot)} == {run for run, holder in self.holders.items() if holder == boot}

    def follows(self, before: AttemptState | None, now: AttemptState) -> bool:
        """Whether a rule may lead from one state to another: some make two steps."""
        first = NEXT.get(before, set()) if before else set()
        return now in first or any(now in NEXT.get(one, set()) for one in first)


def history(url: Callable[[], str], examples: int, steps: int) -> None:
    machine = type("History", (Machine,), {"make": staticmethod(url)})
    options = settings(
        max_examples=examples, stateful_step_count=steps, suppress_health_check=[*HealthCheck], deadline=None
    )
    run_state_machine_as_test(machine, settings=options)


def test_short_histories():
    history(lambda: "", int(os.environ.get("HISTORIES", "15")), 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long_histories():
    history(lambda: "", 500, 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.postgres
def test_histories_on_postgres(empty_postgres: Callable[[], str]):
    history(empty_postgres, 60, 60)
