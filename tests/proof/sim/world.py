"""A simulated world: callers of our code, a crew's server and a Prefect server, on one loop and one clock.

Real are the whole of this package's core, Prefect's HTTP client, and the local crew server. Simulated are time, what
the Prefect server answers, and how processes die. Left out are artifacts, which are a view, and the flow engine, which
the kill matrix has for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import random
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import anyio
import httpx
from prefect.exceptions import PrefectException
from pydantic import SecretStr

from prefect_crew.batches.report import BatchReport
from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.budgets import Budget
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import CrewError, IdempotencyConflictError, KickoffUncertainError, PrefectAwayError
from prefect_crew.records.decision import Caller
from prefect_crew.records.keys import Nonce, RunIdentity
from prefect_crew.records.model import RunRecord
from prefect_crew.records.prune import prune
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import kickoff
from prefect_crew.runs import wait as wait_module
from prefect_crew.runs.options import RunOptions, RunRequest
from prefect_crew.runs.run import LiveRun
from proof.sim.batch import Batches
from proof.sim.loop import Process, SimLoop, current_process
from proof.sim.person import resolve_if_allowed, resolve_truly
from proof.sim.prefect_api import SimPrefect
from proof.sim.scenario import Call, Prune, Root, Scenario
from proof.sim.site import HOST, CrewSite
from proof.sim.stage import on_stage

__all__ = ["Ending", "Value", "World", "is_result", "key_of", "keys_of"]

REQUEST_TIMEOUT = 10.0
TASK_RETRIES = (2.0, 10.0, 30.0)
"""As the kickoff task's."""
HANGS_AFTER = 6 * 3600.0
"""Simulated seconds after which a call that still waits is taken to hang."""


SESSION = "customer-42"
LAST = 999
"""The number of the key of the last call of all."""


_nonce: contextvars.ContextVar[Nonce | None] = contextvars.ContextVar("proof_nonce", default=None)


def key_of(number: int) -> str:
    """Return the idempotency key of a scenario's key number."""
    return f"key-{number}"


def keys_of(call: Call) -> list[str]:
    """Return the idempotency keys of a call: one, or that of each of its rows."""
    return [f"batch/b{call.key}/r{row}" for row in range(call.rows)] or [key_of(call.key)]


Value = CrewResult | BatchReport | BaseException


def is_result(value: Value) -> bool:
    """Return whether a call brought all that it was asked for."""
    return isinstance(value, CrewResult) or (isinstance(value, BatchReport) and value.completed == value.total)


class Ending(NamedTuple):
    """How one call ended: a CrewResult, a BatchReport, an error, or a cancellation."""

    at: float
    process: Process
    call: Call
    value: Value


class Ask(NamedTuple):
    """A call with a key, at the moment at which it was made; whether in the aftermath."""

    at: float
    key: str
    process: Process
    over: bool


class Decided(NamedTuple):
    """A decision, and the phase of the record that it was made about, "nothing" where there was none."""

    at: float
    key: str
    phase: str
    decision: str


class World:
    """One scenario, run once by `play()`; what came of it stays in its attributes."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.loop = SimLoop(scenario.order)
        rng = random.Random(scenario.seed)
        self.prefect = SimPrefect(
            latency=lambda: rng.uniform(0.002, 0.05),
            wall=self.loop.wall,
            faults=dict(scenario.prefect_faults),
            outages=[(start, start + length) for start, length in scenario.outages],
        )
        self.site = CrewSite(scenario, self.prefect)
        self.batches = Batches(self)
        self.site.attempts = self.attempts
        self.policy = WaitPolicy(
            timeout=scenario.timeout,
            human_timeout=600,
            error_timeout=120,
            on_timeout="stop" if scenario.stop_on_timeout else "leave",
        )
        self.crew = self._crew(self.site.token)
        self.processes: list[Process] = []
        self.clerks: list[Process] = []  # who prunes and resolves
        self.outlived: list[asyncio.Task[Any]] = []  # what runs on although its flow run is Crashed
        self.endings: list[Ending] = []
        self.final: dict[str, list[Value]] = {}
        self.events: dict[str, str] = {}
        self.event_count: Counter[tuple[str, str]] = Counter()
        self.owners: dict[str, Process] = {}
        self.closed: Counter[str] = Counter()  # how many callers were told that they close a run, by its claim
        self.cancelled_runs = set[str]()  # the ids of the flow runs that a person has cancelled
        self.asks: list[Ask] = []
        self.decisions: list[Decided] = []
        self.over = False  # what happens from here on is the aftermath
        self.forced: set[tuple[str, str]] = set()
        self.excusing = True  # as the oracle judges it at this moment
        self.violations: list[str] = []
        self.resolved: list[str] = []
        self.persons: set[str] = set()
        self.trace: list[str] = []

    # What the world is made of.

    def attempts(self, idempotency_key: str) -> list[dict[str, Any]]:
        """Return the attempts on record at a key."""
        is_row = idempotency_key.startswith("batch/")
        return (self.batches.attempts if is_row else self.prefect.records)(idempotency_key)

    def _crew(self, token: str) -> Crew:
        budget = self.scenario.budget
        return crew_of(
            DeployedCrew(
                flow=bool(self.scenario.session),
                url=f"https://{HOST}",
                token=SecretStr(token),
                request_timeout=REQUEST_TIMEOUT,
                max_attempts=self.scenario.max_attempts,
                wait=self.policy,
                budgets=[] if budget is None else [Budget(max_kickoffs=budget, per="month", name="b")],
            )
        )

    async def reloaded(self, crew: Crew) -> Crew | None:
        """Stand in for reading the stored block."""
        await asyncio.sleep(0.01)
        stored = self._crew(self.site.stored_token)
        return stored if stored.token != crew.token else None

    async def identify(self, label: str, inputs_digest: str, *, idempotency_key: str, **_: Any) -> RunIdentity:
        """Stand in for Prefect's contexts: who calls, from which flow run."""
        del label, inputs_digest
        process = current_process()
        assert process is not None
        facts = process.facts
        self.asks.append(Ask(self.loop.time(), idempotency_key, process, self.over))
        facts["calls"] = facts.get("calls", 0) + 1
        place = f"{facts['place']}/{facts['calls']}"
        if facts["call"].force_new:
            self.forced.add((idempotency_key, place))
        # The tries of a call are in one context; each call has one of its own.
        nonce = Nonce() if (before := _nonce.get()) is None or before.has_sent else before
        _nonce.set(nonce)
        self.owners[nonce.text] = process
        caller = Caller(owner=nonce.text, flow_run_id=facts["flow_run_id"], flow_run_count=facts["count"])
        return RunIdentity(idempotency_key=idempotency_key, place=place, caller=caller, nonce=nonce)

    def deciding(self, decide: Callable[..., Any]) -> Callable[..., Any]:
        """Return `decide`, with a note of what it says."""

        def noted(record: RunRecord | None, **known: Any) -> Any:
            decision = decide(record, **known)
            process = current_process()
            if process is not None and not self.over:
                key, phase = key_of(process.facts["call"].key), "nothing" if record is None else str(record.phase)
                self.decisions.append(Decided(self.loop.time(), key, phase, str(decision)))
            return decision

        return noted

    def ending(self, end: Callable[..., Any]) -> Callable[..., Any]:
        """Return `PrefectRecords.end`, with a note of whoever closes a run."""

        async def noted(records: PrefectRecords, record: RunRecord, **facts: Any) -> bool:
            is_closed = await end(records, record, **facts)
            self.closed[str(record.ref)] += is_closed
            return is_closed

        return noted

    def emitted(self, *, event: str, payload: Mapping[str, Any], id: uuid.UUID | None = None, **_: Any) -> None:  # noqa: A002
        """Stand in for the server's events, of which it keeps one for each id."""
        key = str(id or uuid.uuid4())
        if key not in self.events:
            self.events[key] = event
            self.event_count[event, str(payload["kickoff_id"])] += 1

    # What happens.

    def play(self) -> World:
        """Let everything happen, then repair what is broken and ask for each key's run again."""
        random.seed(self.scenario.seed)
        asyncio.set_event_loop(self.loop)
        try:
            with on_stage(self):
                self.loop.run_until_complete(self._course())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()
        return self

    async def _course(self) -> None:
        await self.site.open()
        lives = [self.loop.create_task(self._life(n, call)) for n, call in enumerate(self.scenario.calls)]
        lives += [self.loop.create_task(self._prune(n, plan)) for n, plan in enumerate(self.scenario.prunes)]
        lives += [self.loop.create_task(self._root(n, plan)) for n, plan in enumerate(self.scenario.roots)]
        if self.scenario.resolve_every is not None:
            self._clerk("resolver").start(self._resolve(self.scenario.resolve_every))
        _, late = await asyncio.wait(lives, timeout=HANGS_AFTER)
        if self.outlived:
            late |= (await asyncio.wait(self.outlived, timeout=HANGS_AFTER))[1]
        if late:
            self.violations.append(f"{len(late)} calls still wait after {HANGS_AFTER:g} s")
            await self._bury()
            return
        for life in [*lives, *self.outlived]:
            if life.done() and not life.cancelled() and (error := life.exception()):
                raise error
        await self._aftermath()
        await self._bury()

    async def _life(self, number: int, call: Call) -> None:
        """One process, and those that take its place after its end."""
        await asyncio.sleep(call.at)
        flow_run_id = str(uuid.UUID(int=1000 + number)) if call.flow else None
        for attempt, delay in enumerate((*call.again, None)):
            fresh = attempt > 0 and not call.same_flow_run
            if fresh and call.flow:
                flow_run_id = str(uuid.UUID(int=1000 * (attempt + 1) + number))
            process = self.process(f"{number}.{attempt}", call if attempt == 0 else _unharmed(call))
            place = f"{number}/{attempt}" if fresh or not call.flow else str(number)
            count = 1 if fresh else attempt + 1
            process.facts.update(call=call, flow_run_id=flow_run_id, count=count, place=place, first=attempt == 0)
            if flow_run_id:
                if call.root is not None:
                    self.prefect.parents[flow_run_id] = _root_id(call.root)
                self.prefect.flow_runs[flow_run_id] = "RUNNING"
                self.prefect.run_counts[flow_run_id] = count
            good = await self._watch(process, call if attempt == 0 else replace(call, incomplete=False))
            gone = process.dead or self.prefect.flow_runs.get(flow_run_id or "") == "CRASHED"
            if flow_run_id and not gone and self.prefect.flow_runs[flow_run_id] != "CANCELLED":
                self.prefect.flow_runs[flow_run_id] = "COMPLETED" if good else "FAILED"
            if good or delay is None:
                return
            await asyncio.sleep(delay)
            if flow_run_id and self.prefect.flow_runs[flow_run_id] == "CANCELLED" and call.same_flow_run:
                return

    def process(self, name: str, call: Call) -> Process:
        """Make a process that has not begun."""
        process = Process(
            name,
            kill_at=call.kill_at,
            freeze_at=call.freeze_at,
            freeze_for=call.freeze_for,
            cancel_at=call.cancel_at,
            on_cancel=functools.partial(self._cancelling, call),
            on_fate=functools.partial(self._befell, call),
            skew=call.skew,
            skew_at=call.skew_at,
        )
        process.facts.update(call=call, flow_run_id=None, count=0, place=name, first=False, began=self.loop.time())
        self.processes.append(process)
        return process

    def _befell(self, call: Call, process: Process, fate: str) -> None:
        """Note what befalls a process, and how far its run has got."""
        if fate == "cancelled" and not call.asked:
            fate = "shut down"
        records = self.attempts(keys_of(call)[0])
        moment = "posting" if process.facts.get("posting") else records[-1]["phase"] if records else "nothing"
        process.facts["fate"] = (fate, moment)

    def _cancelling(self, call: Call, process: Process) -> None:
        run_id = process.facts["flow_run_id"]
        if call.asked and run_id:
            self.cancelled_runs.add(run_id)
            self.prefect.flow_runs[run_id] = "CANCELLING"
            self.loop.call_later(30, self._cancelled, run_id)

    def _cancelled(self, run_id: str) -> None:
        if self.prefect.flow_runs.get(run_id) == "CANCELLING":
            self.prefect.flow_runs[run_id] = "CANCELLED"

    async def _watch(self, process: Process, call: Call) -> bool:
        """Run a process to its end, death, or until its flow run is Crashed; True if it brought a result."""
        before = len(self.endings)
        main = process.start(self._main(process, call))
        died = self.loop.create_task(process.died.wait())
        run_id = process.facts["flow_run_id"]
        unseen = call.crashed_at if run_id and process.facts["first"] else None
        ended, _ = await asyncio.wait({main, died}, timeout=unseen, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not ended and run_id:
            self.trace.append(f"{self.loop.time():8.2f} {process.name} is said to have crashed")
            self.prefect.flow_runs[run_id] = "CRASHED"
            self.outlived.append(self.loop.create_task(self._outlive(process, main)))
            return False
        if process.dead:
            self.trace.append(f"{self.loop.time():8.2f} {process.name} was killed")
            if run_id and call.crashed_after is not None:
                self.loop.call_later(call.crashed_after, self._crashed, run_id, process.facts["count"])
            return False
        if not main.cancelled():
            main.result()  # what nobody should see ends the test
        mine = self.endings[before:]
        return any(end.process is process and is_result(end.value) for end in mine)

    async def _outlive(self, process: Process, main: asyncio.Task[Any]) -> None:
        """Wait for the end or death of a process whose flow run is Crashed."""
        died = self.loop.create_task(process.died.wait())
        await asyncio.wait({main, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not process.dead and not main.cancelled():
            main.result()  # what nobody should see ends the test

    def _crashed(self, run_id: str, count: int) -> None:
        later = any(p.facts["flow_run_id"] == run_id and p.facts["count"] > count for p in self.processes)
        if not later:
            self.prefect.flow_runs[run_id] = "CRASHED"

    async def _main(self, process: Process, call: Call) -> None:
        await asyncio.gather(*(self._call(process, call) for _ in range(call.at_once)))

    async def _call(self, process: Process, call: Call) -> None:
        value: Value = asyncio.CancelledError("timed out")
        try:
            with anyio.CancelScope() if call.timed_out else contextlib.nullcontext() as scope:
                if scope is not None:
                    process.scopes.append(scope)
                value = await (self.run_batch(call) if call.rows else self.run_crew(call))
        except (CrewError, httpx.HTTPError, PrefectException) as error:
            value = error
        except asyncio.CancelledError as cancelled:
            self._end(process, call, cancelled)
            raise
        self._end(process, call, value)

    def _end(self, process: Process, call: Call, value: Value) -> None:
        if process.buried:
            return
        self.endings.append(Ending(self.loop.time(), process, call, value))
        if isinstance(value, KickoffUncertainError) and self.scenario.resolve_after is not None:
            self._send_person(key_of(call.key), value)
        said = f"{value.output}" if isinstance(value, CrewResult) else f"{type(value).__name__}: {value}"
        self.trace.append(f"{self.loop.time():8.2f} {process.name} ended with {said}")

    def _send_person(self, idempotency_key: str, said: KickoffUncertainError) -> None:
        """Have a person resolve a run, some time after it was reported, and well after whoever posted must know."""
        records = self.prefect.records(idempotency_key)
        if not records:  # they were pruned while whoever reports it was frozen: nothing is left to resolve
            return
        record = records[-1]
        claimed_at = datetime.fromisoformat(record["claimed_at"]).timestamp()
        known_by = claimed_at + record["good_for"] + record["post_deadline"] + 10
        wait = max(known_by - self.loop.wall(), 0.0) + 15 + (self.scenario.resolve_after or 0.0)
        if idempotency_key not in self.persons:
            self.persons.add(idempotency_key)
            # Not in the context of the process that reported it: a person does not fall asleep with its machine.
            send = contextvars.Context().run
            self.loop.call_later(wait, lambda: send(self.loop.create_task, self._person(idempotency_key, said)))

    # Who else acts.

    def _clerk(self, name: str, **fate: Any) -> Process:
        process = Process(name, **fate)
        process.facts.update(call=None, flow_run_id=None, count=0, place=name)
        self.clerks.append(process)
        return process

    async def _prune(self, number: int, plan: Prune) -> None:
        await asyncio.sleep(plan.at)
        fate = {name: getattr(plan, name) for name in ("kill_at", "freeze_at", "freeze_for", "skew")}
        clerk = self._clerk(f"prune {number}", **fate)
        clerk.facts.update(began=self.loop.time(), older_than=plan.older_than)
        main = clerk.start(_quietly(prune(PrefectRecords(), older_than=timedelta(seconds=plan.older_than), share=1.0)))
        died = self.loop.create_task(clerk.died.wait())
        await asyncio.wait({main, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not clerk.dead:
            main.result()  # what nobody should see ends the test

    async def _root(self, number: int, plan: Root) -> None:
        """A root flow run, retried as often as the scenario says."""
        run_id = _root_id(number)
        for start, end in plan.runs:
            await asyncio.sleep(max(0.0, start - self.loop.time()))
            self.prefect.flow_runs[run_id] = "RUNNING"
            await asyncio.sleep(max(0.0, end - self.loop.time()))
            self.prefect.flow_runs[run_id] = "COMPLETED"
        if plan.deleted_at is not None:
            await asyncio.sleep(max(0.0, plan.deleted_at - self.loop.time()))
            del self.prefect.flow_runs[run_id]

    async def _resolve(self, every: float) -> None:
        while True:
            # The longer the world lasts, the longer the pauses.
            await asyncio.sleep(max(every, self.loop.time() / 20))
            await self._resolve_all()

    async def _resolve_all(self) -> None:
        for number in self.numbers(rows=False):
            await _quietly(resolve_if_allowed(self, key_of(number)))
        for number in self.numbers(rows=True):
            await _quietly(self.batches.resolve(number))

    def numbers(self, *, rows: bool) -> list[int]:
        """Return the numbers of all batches, or of all keys of single runs."""
        return sorted({call.key for call in self.scenario.calls if bool(call.rows) is rows})

    async def _person(self, idempotency_key: str, said: KickoffUncertainError) -> None:
        self.persons.discard(idempotency_key)
        await _quietly(resolve_truly(self, idempotency_key, said))

    async def run_batch(self, call: Call) -> BatchReport:
        """Run the rows of a batch, as turns of the session if the scenario has one."""
        process = current_process()
        assert process is not None
        self.asks += [Ask(self.loop.time(), key, process, self.over) for key in keys_of(call)]
        return await self.batches.run(call, SESSION if self.scenario.session else None)

    async def run_crew(self, call: Call) -> CrewResult:
        """Do what the tasks of `run_crew` do, with the retries that Prefect makes of the first one."""
        inputs = {} if call.incomplete else {"topic": "other" if call.other_inputs else f"topic-{call.key}"}
        options = RunOptions(
            idempotency_key=key_of(call.key),
            force_new=call.force_new,
            meta={"nothing": float("nan")} if call.misconfigured else None,
            session=SESSION if self.scenario.session else None,
        )
        request = RunRequest.of(self.crew, Inputs.of(inputs), options)
        pauses, run = list(TASK_RETRIES), LiveRun(self.crew)
        while True:
            try:
                await kickoff.kick_off(run, request, inside_own_task=True)
            except CrewError as error:
                is_away = isinstance(error, PrefectAwayError)
                if not pauses or not (is_away or kickoff_fate(error) is KickoffFate.RETRY):
                    raise
                await asyncio.sleep(pauses.pop(0))
            else:
                return await wait_module.wait_for_run(run)

    # What is found when all is over.

    async def _aftermath(self) -> None:
        """Repair everything, wait until nothing is in flight, and ask for each key's run again, as a user would."""
        self.over = True
        self.site.faults.clear()
        self.site.same_id_for = 0.0
        self.prefect.heal()
        for clerk in self.clerks:
            clerk.kill()
        await asyncio.sleep(1800)
        for run_id, state in self.prefect.flow_runs.items():
            if state in ("RUNNING", "CANCELLING"):
                self.prefect.flow_runs[run_id] = "CRASHED"
        if batches := self.numbers(rows=True):
            await self._end_batches(batches)
        for number in self.numbers(rows=False):
            self.final[key_of(number)] = await self._ask_again(number)
        if batches:  # nothing of them is in the way of another caller
            self.final[key_of(LAST)] = await self._ask_again(LAST)

    async def _end_batches(self, numbers: Sequence[int]) -> None:
        """Call each batch again, and resolve what is uncertain, as often as a row may have to wait for that."""
        calls = {call.key: call for call in self.scenario.calls if call.rows}
        for attempt in range(3):
            await self._resolve_all()
            for number in numbers:
                call = _unharmed(calls[number])
                process = self.process(f"final b{number}.{attempt}", call)
                await process.start(self._main(process, call))
            ends = {state for number in numbers for state in self.batches.states(number).values()}
            if ends <= {"completed", "failed"}:
                break

    async def _ask_again(self, number: int) -> list[Value]:
        said: list[Value] = []
        other = False
        for attempt in range(8):
            call = Call(key=number, other_inputs=other)
            process = self.process(f"final {number}.{attempt}", call)
            before = len(self.endings)
            await process.start(self._main(process, call))
            value = self.endings[before].value
            if isinstance(value, IdempotencyConflictError):
                other = not other  # what was started had the others
                continue
            said.append(value)
            if isinstance(value, CrewResult) or not await resolve_truly(self, key_of(number), value):
                break
        return said

    async def _bury(self) -> None:
        """Cancel what is left of the dead, so that nothing is left over when the loop is closed."""
        self.site.close()
        self.prefect.closed = True
        for process in [*self.processes, *self.clerks]:
            process.bury()
        rest = self._unfinished()
        while rest:
            for task in rest:
                task.cancel()
            await asyncio.wait(rest, timeout=1000)
            for task in rest:
                if task.done() and not task.cancelled():
                    task.exception()
            rest = self._unfinished()
        for process in self.processes:
            process.bury()  # their cleanup may have begun what was cancelled before its first step

    def _unfinished(self) -> set[asyncio.Task[Any]]:
        """Return what is under way, also what the loop does not know of."""
        theirs = {task for process in (*self.processes, *self.clerks) for task in process.tasks if not task.done()}
        return (theirs | asyncio.all_tasks()) - {asyncio.current_task()}


def _root_id(number: int) -> str:
    return str(uuid.UUID(int=900 + number))


async def _quietly(work: Coroutine[Any, Any, object]) -> None:
    """Do what a person does who takes an error for an answer."""
    with contextlib.suppress(CrewError, httpx.HTTPError, PrefectException):
        await work


def _unharmed(call: Call) -> Call:
    return Call(
        at=call.at,
        key=call.key,
        rows=call.rows,
        leaves=call.leaves,
        max_in_flight=call.max_in_flight,
        other_inputs=call.other_inputs,
        force_new=call.force_new,
        flow=call.flow,
    )
