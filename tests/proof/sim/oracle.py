"""The promises, as what must be true of a scenario that has run. Each check yields what is broken, in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from prefect_crew.batches.report import BatchReport
from prefect_crew.client.models import CrewResult
from prefect_crew.devserver._faults import Fired
from prefect_crew.exceptions import (
    AnswerUncertainError,
    BudgetExceededError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    FlowRunCancelledError,
    KickoffUncertainError,
    NoResultError,
    NotWaitingError,
    RunNotFoundError,
    UnreadableRecordError,
)
from prefect_crew.records.model import SPARE, utcnow
from prefect_crew.records.store import entry_in
from prefect_crew.records.variables import Variable
from prefect_crew.states import CrewState
from proof.sim.loop import EPOCH, Process
from proof.sim.prefect_api import Change
from proof.sim.world import REQUEST_TIMEOUT, Ending, World, key_of, keys_of

__all__ = ["broken_promises"]

UNCLEAR = frozenset(
    {
        "408",
        "500",
        "502",
        "503-bare",
        "504",
        "drop",
        "timeout",
        "redirect",
        "html",
        "garbage",
        "empty",
        "no-id",
        "crash",
    }
)
"""Faults of a kickoff after which nobody can know whether it started a run."""
LIES = frozenset({"400", "401", "403", "404", "405", "422", "429", "429-bare", "503"})
"""Answers that mean "not started". A server that starts a run and then gives one of them lies, and what it lied about
is started again: no client can tell."""
READ_WITHIN = 1.0
"""Seconds between a caller's reading of a record and what it says of it, at most."""
WRITTEN_WITHIN = 1.0
"""Simulated seconds, on a good day, from the answer to a kickoff to its id being on record."""
WINDOW = 5.0
MOST_REQUESTS = {"Prefect": 30, "crew": 20}
"""What one call may ask of each server within so many simulated seconds: a wait without pauses asks a hundred times."""
UNEXPECTED = (
    CrewError,
    AnswerUncertainError,
    FlowRunCancelledError,
    NoResultError,
    NotWaitingError,
    RunNotFoundError,
    UnreadableRecordError,
)
"""What no call in a simulated world is told."""
FINAL_EVENTS = ("crew.completed", "crew.failed", "crew.stopped", "crew.lost")


def broken_promises(world: World, *, strict: bool = False) -> list[str]:
    """Return every broken promise, empty if all were kept.

    Without `strict` it excuses what a machine wrote or sent that fell asleep over it, and what a write did that came
    late over a newer one.
    """
    checks = (
        *(_never_twice, _never_two_at_once, _never_lost, _certain, _own_claims, _true_results, _events),
        *(_honest_stops, _timeouts, _records, _closed_once, _withdrawals, _prunes, _starts_after_failures),
        *(_needlessly_uncertain, _requests, _budgets, _sessions, _rows),
    )
    unclaimed = [f"a kickoff of {key} arrived and no claim of it stood" for key in world.site.unclaimed]
    world.excusing = not strict
    if world.site.same_ids:  # nobody can tell whose run it is, so the other checks, which go by keys, say nothing
        checks = (_one_key_for_each_id, _records, _closed_once, _withdrawals, _prunes, _requests, _budgets)
    return [*world.violations, *unclaimed, *(problem for check in checks for problem in check(world))]


def _asleep(world: World, key: str, over: str) -> int:
    """Return how many of a key's processes fell asleep over something that nobody can take back then."""
    return sum(over in process.frozen_in for process in _processes(world, key)) if world.excusing else 0


def _keys(world: World) -> list[str]:
    return sorted({key for call in world.scenario.calls for key in keys_of(call)})


def _forced(world: World, key: str) -> int:
    return sum(idempotency_key == key for idempotency_key, _ in world.forced)


def _fired(world: World, *, after: bool) -> list[Fired]:
    return [fired for fired in world.site.faults.fired if fired.where == "kickoff" and fired.fault.is_after is after]


def _lies(world: World) -> int:
    return sum(fired.fault.base_name in LIES for fired in _fired(world, after=True))


def _processes(world: World, key: str) -> list[Process]:
    return [process for process in world.processes if key in keys_of(process.facts["call"])]


def _hurt(process: Process) -> bool:
    return process.dead or process.was_frozen or process.was_cancelled


def _never_twice(world: World) -> Iterator[str]:
    """What was started was asked for: once, once more for each run that failed, once for each `force_new`."""
    for key in _keys(world):
        runs = [world.site.run(id_) for id_ in world.site.accepted(key)]
        ended_badly = sum(run is not None and run.state in (CrewState.FAILED, CrewState.STOPPED) for run in runs)
        # Nobody can take back a request that is on its way when its machine falls asleep.
        asleep = _asleep(world, key, "posting")
        # What is pruned is promised no more.
        pruned = sum(value["phase"] == "ended" for value in world.prefect.gone(key))
        extra = _forced(world, key) + _lies(world) + asleep + pruned
        if len(runs) > 1 + ended_badly + extra:
            yield f"never twice: {key} was started {len(runs)} times, {1 + ended_badly + extra} were asked for"
        if len(runs) > world.scenario.max_attempts + extra:
            yield f"never twice: {key} was started {len(runs)} times, more than max_attempts"


def _never_two_at_once(world: World) -> Iterator[str]:
    """Of a key's runs that nobody forced, one at a time is in flight, also where its records are pruned at that
    time."""
    for key in _keys(world):
        asleep = _asleep(world, key, "posting")
        most = 1 + _forced(world, key) + _lies(world) + asleep
        began, ended = world.site.accepted_at, world.site.ended_at
        for id_ in (ids := world.site.accepted(key)):
            others = [one for one in ids if one != id_ and began[one] <= began[id_] < ended.get(one, float("inf"))]
            if 1 + len(others) > most:
                yield f"never twice: of {key}, {id_} was started at {began[id_]:.2f} while {others} were in flight"


def _never_lost(world: World) -> Iterator[str]:
    """In the end, every key has a result, or one of the reasons for having none."""
    for key, said in world.final.items():
        last = said[-1]
        runs = [run for id_ in world.site.accepted(key) if (run := world.site.run(id_)) is not None]
        bad = [run for run in runs if run.state in (CrewState.FAILED, CrewState.STOPPED)]
        counted = [record for record in world.prefect.records(key) if record["phase"] != "not-started"]
        fine = (
            isinstance(last, CrewResult)
            or (isinstance(last, CrewTimeoutError) and any(not run.state.ended for run in runs))
            or (isinstance(last, BudgetExceededError) and last.used == world.scenario.budget)
            or (isinstance(last, CrewLostError) and any("forgotten" in run.faults for run in runs))
            or (
                isinstance(last, CrewFailedError | CrewStoppedError)
                and len(counted) >= world.scenario.max_attempts
                and bad
            )
        )
        if not fine:
            yield f"never lost: in the end {key} gives {type(last).__name__}: {last}; the server has {runs}"
        held = {record.get("kickoff_id") for record in [*world.prefect.records(key), *world.prefect.gone(key)]}
        unknown = {run.id for run in runs} - held
        # A record is replaced, not compared: a machine that slept over "uncertain" writes that over what was resolved.
        asleep = _asleep(world, key, "writing")
        if len(unknown) > _lies(world) + _forced(world, key) + asleep:
            yield f"never lost: {unknown} of {key} are on no record"


def _certain(world: World) -> Iterator[str]:
    """Uncertain only where somebody was stopped between claim and record, or a kickoff's answer did not tell."""
    for end in world.endings:
        if isinstance(end.value, KickoffUncertainError) and not _may_be_uncertain(world, end, end.value):
            yield f"certain: {end.process.name} was informed that {key_of(end.call.key)} is uncertain, for no reason"


def _own_claims(world: World) -> Iterator[str]:
    """A call that never sent a kickoff is not informed that its own claim is uncertain, whatever became of that."""
    for end in world.endings:
        if not isinstance(end.value, KickoffUncertainError) or end.call.at_once > 1 or _hurt(end.process):
            continue
        attempt = f"{end.value.idempotency_key}/{end.value.sent['attempt']}"
        claims = [one.value for one in world.prefect.changes if one.name == attempt and one.value is not None]
        is_own = world.owners[claims[-1]["owner"]] is end.process
        if is_own and not end.process.facts.get("began posting"):
            yield f"certain: {end.process.name} sent no kickoff, and its own claim {attempt} is called uncertain"


def _may_be_uncertain(world: World, end: Ending, error: KickoffUncertainError) -> bool:
    about = (error.idempotency_key, int(error.sent["attempt"]))
    written = [(one.at, one.value) for one in world.prefect.changes if one.at <= end.at and one.value is not None]
    versions = [(at, value) for at, value in written if (value["idempotency_key"], value["attempt"]) == about]
    # Somebody may resolve it between a caller's reading and its telling.
    before = [value for _, value in versions[:-1] if versions[-1][0] > end.at - READ_WITHIN]
    read = [*before[-1:], versions[-1][1]]
    owner = world.owners[read[-1]["owner"]]
    if owner.was_frozen or owner.was_cancelled or end.process.was_frozen:  # what a sleeper has read is old
        return True
    if (crashed := owner.facts["call"].crashed_at) is not None and end.at >= owner.facts["began"] + crashed:
        return True  # the Prefect server said so
    if owner.dead and owner.died_at - owner.facts.get("done posting", owner.died_at) < WRITTEN_WITHIN:
        return True
    fired = [fired.fault for fired in world.site.faults.fired if fired.where == "kickoff"]
    slow = sum(fault.value or 0 for fault in fired if fault.base_name == "latency") >= REQUEST_TIMEOUT
    network = slow or any(fault.base_name in UNCLEAR for fault in fired) or world.site.crashes > 0
    # A Prefect API that is away leaves the claim as it is.
    return network if any(one["phase"] == "uncertain" for one in read) else bool(world.prefect.fired)


def _budgets(world: World) -> Iterator[str]:
    """A counter may be too high after a crash. It is never lower than what was started, nor is more started."""
    if (limit := world.scenario.budget) is None:
        return
    counted = sum(counter["active_slots"] for counter in world.prefect.counters.values())
    started = sum(len(world.site.accepted(key)) for key in _keys(world)) - _lies(world)
    if started > limit:
        yield f"budgets: {started} runs were started, {limit} were allowed"
    if started > counted:
        yield f"budgets: {started} runs were started, {counted} are counted"


def _sessions(world: World) -> Iterator[str]:
    """Turns of a session come one after the other, each with a state of its own that starts from the last completed
    one."""
    if not world.scenario.session or _lies(world) or any(_asleep(world, key, "posting") for key in _keys(world)):
        return
    began, ended = world.site.accepted_at, world.site.ended_at
    runs = sorted(world.site.runs, key=lambda run: began[run.id])
    last = None
    for before, run in zip([None, *runs], runs, strict=False):
        if before is not None and ended.get(before.id, float("inf")) > began[run.id]:
            yield f"sessions: {run.id} was started at {began[run.id]:.2f} while {before.id} was in flight"
        if before is not None and before.state is CrewState.COMPLETED:
            last = before.id
        if run.restore_from != last:
            yield f"sessions: {run.id} starts from {run.restore_from}, the last completed state is {last}"


def _rows(world: World) -> Iterator[str]:
    """In the end, each row has completed or its run has ended badly, and each run that was started is on record. A row
    that has left the data set may not have started."""
    for number in world.numbers(rows=True):
        calls = [end for end in world.endings if end.call.rows and end.call.key == number]
        if not calls:
            continue  # it still waits, which is a violation by itself
        if not isinstance(calls[-1].value, BatchReport):
            yield f"never lost: in the end batch {number} gives {calls[-1].value!r}"
        states = world.batches.states(number)
        for key in keys_of(calls[-1].call):
            runs = [run for id_ in world.site.accepted(key) if (run := world.site.run(id_)) is not None]
            is_bad = any(run.state in (CrewState.FAILED, CrewState.STOPPED) for run in runs)
            state = states.get(key.rpartition("/")[2])
            has_left = int(key.rpartition("/r")[2]) < calls[-1].call.leaves
            is_over = state == "completed" or (is_bad and state in ("failed", "stopped"))
            if not is_over and not (has_left and not runs):
                yield f"never lost: in the end {key} is {state}; the server has {runs}"
            unknown = {run.id for run in runs} - {record.get("kickoff_id") for record in world.attempts(key)}
            if len(unknown) > _lies(world):
                yield f"never lost: {unknown} of {key} are on no record"
            is_harmless = not (world.site.kickoff_faults or world.site.crashes or world.prefect.fired)
            if key in world.resolved and is_harmless and not any(map(_hurt, _processes(world, key))):
                yield f"certain: {key} was uncertain, for no reason"


def _true_results(world: World) -> Iterator[str]:
    for end in world.endings:
        if isinstance(end.value, CrewResult):
            yield from _true_result(world, end, end.value)
        elif type(end.value) in UNEXPECTED and not _of_cancelled_flow_run(world, end):
            yield f"{end.process.name} got a {type(end.value).__name__}: {end.value}"


def _of_cancelled_flow_run(world: World, end: Ending) -> bool:
    """Return whether an attempt of a flow run ended since a person had cancelled that flow run during an earlier one.

    An attempt is retried while the one before it goes on where that was said to have crashed and had not.
    """
    is_cancelled = end.process.facts["flow_run_id"] in world.cancelled_runs
    return isinstance(end.value, FlowRunCancelledError) and is_cancelled and not end.process.was_cancelled


def _true_result(world: World, end: Ending, result: CrewResult) -> Iterator[str]:
    key, name = key_of(end.call.key), end.process.name
    run = world.site.run(result.kickoff_id)
    topic = "other" if end.call.other_inputs else f"topic-{end.call.key}"
    if run is None or result.kickoff_id not in world.site.accepted(key):
        yield f"{name} got the result of run {result.kickoff_id}, which is none of {key}"
    elif run.state is not CrewState.COMPLETED:
        yield f"unknown is not success: {name} got a result of {run}"
    elif result.output != run.output:
        yield f"{name} got {result.output!r}, the run gave {run.output!r}"
    elif run.inputs["topic"] != topic:
        yield f"conflict: {name} asked for {topic} and got a run of {run.inputs['topic']}"


def _events(world: World) -> Iterator[str]:
    """The end is reported once, and at all unless something befell whoever saw it."""
    for (event, kickoff_id), count in world.event_count.items():
        if event in FINAL_EVENTS and count > 1:
            yield f"events: {event} of run {kickoff_id} came {count} times"
    for key in _keys(world):
        # A call of the same session that waits for the run's turn may be the first to see its end.
        waits = {line.split()[1] for line in world.trace if "this call waits" in line and line.endswith(f"run {key}.")}
        waiting = [process for process in world.processes if process.name in waits]
        if any(_hurt(process) for process in [*_processes(world, key), *waiting]):
            continue
        for record in world.prefect.records(key):
            event = f"crew.{record.get('state')}"
            if record["phase"] == "ended" and not world.event_count[event, record["kickoff_id"]]:
                yield f"events: the end of run {record['kickoff_id']} ({record['state']}) was reported to nobody"


def _honest_stops(world: World) -> Iterator[str]:
    """A run is stopped by a call with its key: one that was cancelled, or is over its time."""
    for id_ in world.site.stop_asked:
        run = world.site.run(id_)
        key = "" if run is None else run.meta["idempotency_key"]
        asked = any(process.was_cancelled and process.facts["call"].asked for process in _processes(world, key))
        # Who is cancelled while it stops a run that is over its time ends as cancelled.
        late = world.scenario.stop_on_timeout and any(
            key_of(end.call.key) == key and (isinstance(end.value, CrewTimeoutError) or end.process.was_cancelled)
            for end in world.endings
        )
        if not (asked or late):
            yield f"stopping is honest: /stop was called for {id_} of {key}, and nobody had asked"


def _timeouts(world: World) -> Iterator[str]:
    """A wait ends by the recorded kickoff, not by when somebody began to wait."""
    if any(process.was_frozen or process.facts["call"].skew for process in world.processes):
        return  # the moment of a kickoff is when its answer was read
    for end in world.endings:
        if not isinstance(end.value, CrewTimeoutError) or end.value.phase == "human":
            continue
        # As it stood when the caller gave up: where a write came late, another moment may stand in the end.
        kickoffs = [
            datetime.fromisoformat(change.value["kicked_off_at"]).timestamp()
            for change in world.prefect.changes
            if change.value is not None and change.at <= end.at
            if change.value.get("kickoff_id") == end.value.kickoff_id and change.value.get("kicked_off_at")
        ]
        waited = EPOCH + end.at - min(kickoffs, default=0.0)
        if waited < end.value.limit - 0.001:
            yield f"{end.process.name} gave up after {waited:.1f} s, its time was {end.value.limit:g} s"


_NEXT = {
    "claimed": {
        "claimed",
        "started",
        "uncertain",
        "not-started",
        "ended",
    },  # the last where the id could not be written
    "started": {"started", "ended"},
    "uncertain": {"uncertain", "started", "not-started"},
    "not-started": {"not-started"},
    "ended": {"ended"},
}


def _records(world: World) -> Iterator[str]:
    """A record only ever goes forward, keeps its run, and says of the end what the server says."""
    latest: dict[str, dict[str, Any]] = {}
    # Prefect's client may send an older write once more, over a newer one, and a machine that wakes up may write the id
    # that somebody else has written since. It is the same run: its end is seen again.
    late = world.excusing and (bool(world.prefect.fired) or any(process.was_frozen for process in world.processes))
    for change in world.prefect.changes:
        if change.value is None:
            latest.pop(change.name, None)
            continue
        before, now = latest.get(change.name), dict(change.value)
        # Nor can a machine take back the write over which it fell asleep: of its own claim, once it is awake.
        owner = world.owners[now["owner"]]
        stale = world.excusing and "writing" in owner.frozen_in and change.at >= owner.frozen_until
        # A kickoff that was answered with the id of another one: its record takes the id back.
        is_taken_back = bool(world.site.same_ids) and now["phase"] == "uncertain"
        # Nothing that is written late takes back an end: it is an entry of its own, which nobody changes.
        has_ended = before is not None and before["phase"] == "ended"
        if before is not None and (has_ended or not (stale and now["phase"] != "ended")) and not is_taken_back:
            is_late_id = late and now["phase"] == "started" and not has_ended
            if now["phase"] not in _NEXT[before["phase"]] and not is_late_id:
                yield f"records: {change.name} went from {before['phase']} to {now['phase']} at {change.at:.2f}"
            if before.get("kickoff_id") and now.get("kickoff_id") != before["kickoff_id"]:
                yield f"records: {change.name} changed its run at {change.at:.2f}"
        latest[change.name] = now
    ids = [value["kickoff_id"] for value in latest.values() if value.get("kickoff_id")]
    if len(ids) != len(set(ids)):
        yield "records: two of them hold one run"
    for name, value in latest.items():
        run = world.site.run(str(value.get("kickoff_id")))
        if value["phase"] == "ended" and (run is None or str(run.state) != value["state"]):
            yield f"records: {name} says {value['state']}, the server {run}"


def _closed_once(world: World) -> Iterator[str]:
    """One caller closes a run, and its log has one end. Whoever sleeps until the record was pruned closes it again."""
    there = {one["id"] for one in world.prefect.variables.values()}
    closed = ((claim, count) for claim, count in world.closed.items() if claim in there)
    yield from (f"ends: {claim} was closed {count} times" for claim, count in closed if count > 1)
    ends: Counter[str | None] = Counter(
        entry.claim
        for one in world.prefect.variables.values()
        if (entry := entry_in(Variable(one["id"], one["name"], one["value"], 0.0, 0.0, utcnow()))) and entry.is_final
    )
    yield from (f"ends: the log of {claim} has {count}" for claim, count in ends.items() if count > 1)


def _one_key_for_each_id(world: World) -> Iterator[str]:
    """Where two kickoffs are answered with one id, the results of that run are those of one key."""
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for end in world.endings:
        if isinstance(end.value, CrewResult):
            keys[end.value.kickoff_id].add(key_of(end.call.key))
        elif type(end.value) in UNEXPECTED and not _of_cancelled_flow_run(world, end):
            yield f"{end.process.name} got a {type(end.value).__name__}: {end.value}"
    yield from (f"one id: the result of {id_} was given to {sorted(of)}" for id_, of in keys.items() if len(of) > 1)
    for key, said in world.final.items():
        if not isinstance(said[-1], CrewResult):
            yield f"never lost: in the end {key} gives {type(said[-1]).__name__}: {said[-1]}"


def _withdrawals(world: World) -> Iterator[str]:
    """A call removes a claim of its own only, and only while nobody could have started a run for it."""
    for change in world.prefect.changes:
        before = change.before
        if change.value is not None or before is None or change.by is None or change.by.facts["call"] is None:
            continue
        if world.owners[before["owner"]] is not change.by:
            yield f"withdrawals: {change.by.name} removed {change.name} at {change.at:.2f}, which is not its own"
        if before["phase"] not in ("claimed", "not-started") or (before["phase"] == "claimed" and before["entries"]):
            yield f"withdrawals: {change.name} was removed at {change.at:.2f}, and a kickoff of it may have been sent"


def _prunes(world: World) -> Iterator[str]:
    """Only what has ended, or never started, is pruned, and whose flow runs can be retried within the time no more."""
    for change, clerk in _removed(world):
        if (phase := change.before["phase"]) not in ("ended", "not-started"):
            yield f"prune: {change.name} was removed while it was {phase}"
        # Since the clerk began, there was a moment at which all of them had ended so long ago.
        line = _line(world, change.before.get("flow_run_id"))
        least = max(clerk.facts["older_than"], SPARE)
        first, last = clerk.facts["began"], change.at
        ends = [at - EPOCH + least for run_id in line for at, _ in world.prefect.flow_runs.history[run_id]]
        moments = [first, *(at for at in ends if first <= at <= last)]
        if not any(all(_had_ended(world, run_id, at, least) for run_id in line) for at in moments):
            yield f"prune: {change.name} was removed at {last:.2f}, and a retry of its flow runs {line} may ask for it"


def _removed(world: World) -> Iterator[tuple[Change, Process]]:
    for change in world.prefect.changes:
        if change.value is None and change.before is not None and change.by in world.clerks:
            yield change, change.by


def _line(world: World, run_id: str | None) -> list[str]:
    """Return a flow run and those above it, also where they were deleted."""
    line: list[str] = []
    while run_id is not None and run_id in world.prefect.flow_runs.history:
        line.append(run_id)
        run_id = world.prefect.parents.get(run_id)
    return line


def _had_ended(world: World, run_id: str, moment: float, least: float) -> bool:
    """Return whether a flow run had ended so many seconds before a moment, or was deleted by then."""
    past = [(at - EPOCH, state) for at, state in world.prefect.flow_runs.history[run_id] if at - EPOCH <= moment]
    at, state = past[-1]
    return state is None or (state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and moment - at >= least)


def _starts_after_failures(world: World) -> Iterator[str]:
    """A run that failed is started again only by those who asked after its end: who waited for it takes the failure."""
    if any(process.facts["call"].skew for process in world.processes):
        return  # who asked first is known by clocks only
    for key in _keys(world):
        ids = world.site.accepted(key)
        extra = _forced(world, key) + _lies(world) + _asleep(world, key, "posting") + len(world.prefect.gone(key))
        for failed in ids:
            run = world.site.run(failed)
            if run is None or run.state not in (CrewState.FAILED, CrewState.STOPPED):
                continue
            end = world.site.ended_at[failed]
            starts = sorted(at for id_ in ids if (at := world.site.accepted_at[id_]) > end)
            for number, at in enumerate(starts, 1):
                asked = sum(ask.key == key and end <= ask.at <= at for ask in world.asks)
                if number > asked + extra:
                    yield f"failures: {key} was started {number} times after {failed} had failed, {asked} asked for it"
                    break


def _needlessly_uncertain(world: World) -> Iterator[str]:
    """A record is made uncertain by its own kickoff, and only if that may have started a run."""
    claimed: dict[tuple[str, str], float] = {}
    for change in world.prefect.changes:
        record = change.value
        if record is not None:
            claimed.setdefault((change.name, record["owner"]), change.at)
        if record is None or record["phase"] != "uncertain" or (change.before or {}).get("phase") == "uncertain":
            continue
        owner = world.owners[record["owner"]]
        began = claimed[change.name, record["owner"]]
        met = [
            fired.fault
            for at, key, fired in world.site.kickoff_faults
            if key == record["idempotency_key"] and began <= at <= change.at
        ]
        slow = any(fault.base_name == "latency" and (fault.value or 0) >= REQUEST_TIMEOUT for fault in met)
        unclear = slow or any(fault.base_name in UNCLEAR for fault in met) or world.site.crashes > 0
        if not (unclear or owner.was_frozen or owner.was_cancelled):
            yield f"certain: {change.name} was made uncertain at {change.at:.2f}, and its kickoff was answered clearly"


def _requests(world: World) -> Iterator[str]:
    """Nobody asks a server again and again without a pause."""
    for server, asked in (("Prefect", world.prefect.asked), ("crew", world.site.transport.asked)):
        by: defaultdict[Process, list[float]] = defaultdict(list)
        for at, process in asked:
            if process is not None:
                by[process].append(at)
        for process, ats in by.items():
            call = process.facts["call"]
            # A call that finds another turn in flight gives its claim back, waits, and claims again.
            factor = 2 if world.scenario.session else 1
            at_once = 2 if call is None else max(call.at_once, call.rows + 1 if call.rows else 1)
            most = factor * MOST_REQUESTS[server] * at_once  # prune deletes several
            busy = next((at for at, later in zip(ats, ats[most:], strict=False) if later - at < WINDOW), None)
            if busy is not None:
                yield f"requests: {process.name} asked {server} more than {most} times in {WINDOW:g} s from {busy:.2f}"
