"""The table of scenarios: what the crew's server has got, and what each caller sees. It holds for any way to record it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outcomes.driver import (
    ASKS,
    ENDLESS,
    FAILS,
    FLOW,
    LONG,
    LONGER,
    PICKY,
    SLOW,
    After,
    Batch,
    Call,
    Command,
    Fickle,
    Pause,
    Result,
    Retried,
    Row,
    Server,
    StoppedByCommand,
    Together,
    approve,
    crew,
    play,
)
from prefect_crew import (
    BudgetExceededError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    IdempotencyConflictError,
    KickoffUncertainError,
    ResponseFormatError,
    SessionBlockedError,
)

pytestmark = pytest.mark.usefixtures("prefect_api")

BOTH = ("documented", "live")
RESOLVE = ("{key}", "prefect-crew runs resolve")
UNCERTAIN = Call(KickoffUncertainError, run=None, says=RESOLVE)
REFUSED = Call(CrewAPIError, run=None)
CONFLICT = Call(IdempotencyConflictError, run=None, text="coffee", says=("{key}", "other values of 'text'"))
FAILED = Call(CrewFailedError, says=("{run1}", "the search engine is down"))
SHORT = {"wait": {"timeout": 0.5}}
LATE = Call(CrewTimeoutError, options=SHORT, says=("{key}", "{run1}"))
STOPPING = {"wait": {"timeout": 0.5, "on_timeout": "stop"}}
FORGETFUL = {"wait": {"grace": 0.0, "lost_after": 0.3}}
LOST = Call(CrewLostError, options=FORGETFUL, says=("{run1}", "prefect-crew runs resolve"))
PEOPLE = {"wait": {"human_timeout": 1.0}}
TOLD = crew({"output": "done"}, inputs=("text",))
TURN = {"session": "s"}
ONE = {"concurrency_limit": 1}
SLOW_FLOW = crew({"seconds": 0.6, "output": "{{ state.turn }} after {{ state.output }}"}, flow=True)


def turn(gives: str | type[CrewError], key: str, *, run: int | None = 1, text: str = "tea", session: str = "s") -> Call:
    """Return a call that is a turn of a session of its scenario."""
    return Call(gives, run, key, text, options={"session": session})


def uncertain_rows() -> Iterator[Row]:
    """A kickoff that may have started a run is not sent again, whatever the answer was; neither by a second call."""
    faults = ("408", "500", "502", "503-bare", "504", "drop", "redirect", "html", "garbage", "empty", "no-id")
    for fault in faults:
        for when, started in (("before", 0), ("after", 1)):
            text = f"kickoff:{fault}-{when}-accept@1"
            formats = BOTH if fault in ("500", "drop") else ("documented",)
            yield Row(f"{fault} {when} accept", (UNCERTAIN, UNCERTAIN), started, 1, faults=(text,), formats=formats)
    timeout = Call(KickoffUncertainError, None, says=RESOLVE, crew={"request_timeout": 0.5})
    yield Row("no answer in time", (timeout, UNCERTAIN), 1, faults=("kickoff:timeout-after-accept@1",))
    yield Row("an answer too late", (timeout, Pause(2), UNCERTAIN), 1, faults=("kickoff:latency=2@1",))


# fmt: off
ROWS = (
    # A key has one run.
    Row("a run", (Call(),), 1, formats=BOTH),
    Row("a second call returns its result", (Call(), Call(), Call()), 1, formats=BOTH),
    Row("a slow run", (Call(),), 1, crew=SLOW, formats=BOTH),
    Row("calls without a key are two runs", (Call(key=None), Call(key=None, run=2)), 2),
    Row("two keys are two runs", (Call(), Call(key="other", run=2), Call()), 2),
    Row("five at once with one key", (Together((Call(),) * 5), Call()), 1, crew=SLOW, formats=BOTH),
    Row("at once with two keys", (Together((Call(run=None), Call(run=None, key="other"))),), 2),
    Row("a second call waits for the run", (Together((Call(), After(1, Call()))),), 1, crew=SLOW),
    Row("other inputs are a conflict", (Call(), CONFLICT, Call()), 1, formats=BOTH),
    Row("other inputs beside a run", (Together((Call(), After(1, CONFLICT))),), 1, crew=SLOW),
    Row("another crew is a conflict", (Call(), Call(IdempotencyConflictError, None, crew={"url": "http://127.0.0.1:9"})), 1),
    Row("a secret input makes no other run", (Call("done", crew={"secret_inputs": ["text"]}), Call("done", text="x", crew={"secret_inputs": ["text"]})), 1, crew=TOLD),
    Row("a flow that is retried finds its two runs", (Retried(2),), 2),
    Row("a flow that is retried finds its two forced runs", (Retried(2, {"idempotency_key": "k", "force_new": True}),), 2),
    Row("force_new starts another", (Call(), Call(run=2, options={"force_new": True})), 2, formats=BOTH),
    Row("force_new beside a run", (Together((Call(), After(1, Call(run=2, options={"force_new": True})))),), 2, crew=SLOW),
    Row("force_new where a kickoff is uncertain", (UNCERTAIN, Call(run=2, options={"force_new": True})), 2, faults=("kickoff:drop-after-accept@1",)),
    # A failure is no result, and is started again up to max_attempts.
    Row("a crew that fails", (FAILED,), 1, crew=FAILS, formats=BOTH),
    Row("a failed run is started again", (FAILED, Call(run=2), Call(run=2)), 2, crew=Fickle, formats=BOTH),
    Row("three attempts", (FAILED, *(Call(CrewFailedError, run) for run in (2, 3, 3))), 3, crew=FAILS),
    Row("one attempt", tuple(Call(CrewFailedError, crew={"max_attempts": 1}, says=("{run1}", "raise max_attempts")) for _ in range(2)), 1, crew=FAILS),
    Row("at once with a crew that fails", (Together((Call(CrewFailedError, crew={"max_attempts": 1}),) * 3),), 1, crew=crew({"seconds": 1, "fail": "no"})),
    Row("the result of a failure", (FAILED, Result(CrewFailedError, says=("{run1}",))), 1, crew=FAILS),
    # What surely started nothing is sent again, in the call or by the next one.
    Row("429 with Retry-After", (Call(),), 1, 3, faults=("kickoff:429=0.2@1-2",), formats=BOTH),
    Row("429 without Retry-After", (Call(), Call()), 1, 2, faults=("kickoff:429-bare@1",)),
    Row("503 with Retry-After", (Call(), Call()), 1, 2, faults=("kickoff:503=0.2@1",), formats=BOTH),
    Row("a second call beside a pause after 429", (Together((Call(), Call())),), 1, 2, faults=("kickoff:429=1@1",)),
    *(Row(f"{code} at the kickoff", (REFUSED, Call(), Call()), 1, 2, faults=(f"kickoff:{code}@1",)) for code in (400, 401, 403, 404, 405)),
    Row("422 at the kickoff", (REFUSED, Call(), Call()), 1, 2, faults=("kickoff:422@1",), formats=BOTH),
    Row("refused, and then with other inputs", (REFUSED, Call("coffee", text="coffee")), 1, 2, faults=("kickoff:422@1",)),
    Row("inputs that the crew does not take", (Call(CrewAPIError, None, says=("topic", "Nothing was started")),) * 2, 0, crew=crew({"output": "x"}, inputs=("topic",)), formats=BOTH),
    *(Row(f"{fault} at GET /inputs", (Call(),), 1, faults=(f"inputs:{fault}@1",)) for fault in ("404", "429", "500", "drop", "garbage")),
    Row("401 at GET /inputs", (REFUSED, Call()), 1, faults=("inputs:401@1",)),
    Row("a web page at GET /inputs", (Call(ConfigurationError, None), Call()), 1, faults=("inputs:html@1",)),
    Row("no server", (Call(CrewConnectionError, None, crew={"url": "http://127.0.0.1:9"}, options={"kickoff_options": {"retries": 0}}), ), 0),
    Row("a run that is found needs no room in the limit", (Together((Call(crew=ONE), After(1, Call(crew=ONE)))),), 1, crew=LONG),
    Row("a budget of one kickoff", (Call(options={"max_kickoffs": 1}), Call(BudgetExceededError, None, "other", options={"max_kickoffs": 1}), Call(options={"max_kickoffs": 1})), 1),
    # Uncertain: a person resolves it.
    *uncertain_rows(),
    Row("uncertain for all who call at once", (Together((UNCERTAIN,) * 3),), 1, faults=("kickoff:500-after-accept",)),
    Row("other inputs where it is uncertain", (UNCERTAIN, CONFLICT, UNCERTAIN), 1, faults=("kickoff:500-after-accept@1",)),
    Row("the result of what is uncertain", (UNCERTAIN, Result(CrewError, None, says=("{key}",))), 1, faults=("kickoff:drop-after-accept@1",)),
    Row("resolved as started", (UNCERTAIN, Command("runs resolve {key} --kickoff-id {run1} --crew", waits=True), Call(), Call()), 1, faults=("kickoff:drop-after-accept@1",), formats=BOTH),
    Row("an id that the server does not know, said too early", (UNCERTAIN, Command("runs resolve {key} --kickoff-id 5e1f --crew", 1, ("{key}",)), UNCERTAIN), 1, faults=("kickoff:drop-after-accept@1",)),
    Row("resolved with an id that the server does not know", (UNCERTAIN, Command("runs resolve {key} --kickoff-id 5e1f --crew", 2, ("5e1f",), waits=True), UNCERTAIN), 1, faults=("kickoff:drop-after-accept@1",)),
    Row("never started, said too early", (UNCERTAIN, Command("runs resolve {key} --never-started --yes", 1, ("{key}",)), UNCERTAIN), 1, faults=("kickoff:500-after-accept@1",)),
    Row("never started, said in time", (UNCERTAIN, Command("runs resolve {key} --never-started --yes", waits=True), Call(), Call()), 1, 2, faults=("kickoff:500@1",)),
    Row("nothing to resolve", (Call(), Command("runs resolve {key} --never-started --yes", 1, ("{key}",)), Call()), 1),
    # Never lost: what a failed poll says, and what it does not.
    Row("bad answers while it waits", (Call(),), 1, faults=("status:500@1", "status:429=0.1@2", "status:drop@3", "status:html@4", "status:garbage@5"), formats=BOTH),
    Row("a web page, and then an answer", (Call(ResponseFormatError, options={"wait": {"error_timeout": 0.3}}, says=("{key}",)), Server(), Call()), 1, faults=("status:html",)),
    Row("not known at first", (Call(),), 1, faults=("kickoff:early-404=3",), formats=BOTH),
    Row("401 while it waits", (REFUSED, Call()), 1, crew=SLOW, faults=("status:401@1",)),
    Row("the token is rotated, and the block has it", (Together((Call(stored=True), After(1, Server(token="new", save=True)))),), 1, crew=LONG),
    Row("the token is rotated, and nobody has it", (Together((Call(CrewAPIError), After(1, Server(token="new")))), Call()), 1, crew=LONG),
    Row("forgotten", (LOST, LOST), 1, crew=ENDLESS, faults=("status:forgotten@3",), formats=BOTH),
    Row("forgotten, and resolved as lost", (LOST, Command("runs resolve {key} --lost --yes --crew"), Server(), Call(run=2)), 2, crew=SLOW, faults=("kickoff:early-404=0", "status:forgotten@1-4")),
    Row("late, and left running", (LATE, LATE), 1, crew=ENDLESS, formats=BOTH),
    Row("late, and found again", (LATE, Call(), Result()), 1, crew=LONGER),
    Row("late, and stopped", (Call(CrewTimeoutError, options=STOPPING, says=("{run1}", "It was stopped")), Result(CrewStoppedError)), 1, crew=ENDLESS, stops=1),
    Row("late, and not to be stopped", (Call(CrewTimeoutError, options=STOPPING, says=("{run1}", "left running")), LATE), 1, crew=ENDLESS, faults=("stop:404",), stops=1),
    Row("late, and a stop that fails", (Call(CrewTimeoutError, options=STOPPING, says=("{run1}", "left running")), LATE), 1, crew=ENDLESS, faults=("stop:500",), stops=1),
    Row("a caller is cancelled, and the crew runs on", (Call(cancel_when=1), Call()), 1, crew=LONG),
    Row("a person stops it", (Together((Call(CrewStoppedError, says=("{run1}",)), After(1, Command("runs cancel {key} --crew")))), Result(CrewStoppedError)), 1, crew=ENDLESS, stops=1),
    Row("stopped, and called anew", (Together((Call(CrewStoppedError), After(1, Command("runs cancel {key} --crew")))), Call(CrewTimeoutError, 2, options=SHORT)), 2, crew=ENDLESS, stops=1),
    *(Row(f"a person stops it, retried is: {what}", (StoppedByCommand(what),), 1, crew=ENDLESS, stops=1) for what in ("flow", "task", "above")),
    Row("the result of a run in flight", (LATE, Result(CrewError, None)), 1, crew=ENDLESS),
    Row("the result", (Call(), Result(), Command("result {key}", says=("tea",)), Command("result {run1}", says=("tea",))), 1),
    Row("the result of nothing", (Result(CrewError, None, says=("{key}",)), Command("result {key}", 2, ("{key}",))), 0),
    # People's answers are sent once.
    Row("a function approves", (Call(options={"review": approve}),), 1, crew=ASKS, resumes=1),
    Row("nobody answers", (Call(CrewTimeoutError, options=PEOPLE, says=("{run1}",)), Call("tea", options={"review": approve})), 1, crew=ASKS, resumes=1),
    Row("an answer whose own answer fails", (Call(CrewError, options={"review": approve}, says=("{run1}",)), Call()), 1, crew=ASKS, resumes=1, faults=("resume:500-after-accept@1",)),
    Row("an answer that may not have arrived", (Call(CrewError, options={"review": approve, **PEOPLE}),) * 2, 1, crew=ASKS, resumes=1, faults=("resume:drop-before-accept@1",)),
    Row("a command approves", (Together((Call(), After(1, Command("reviews approve {run1} --crew"), polls=3))),), 1, crew=ASKS, resumes=1),
    # The turns of a session.
    Row("two turns", (turn("1", "a"), turn("2 after 1", "b", run=2), turn("1", "a"), turn("2 after 1", "b", run=2)), 2, crew=FLOW, formats=BOTH),
    Row("turns at once", (Together((turn("1 after ", "a"), After(1, turn("2 after 1 after ", "b", run=2)))),), 2, crew=SLOW_FLOW),
    Row("a failed turn is not built on", (turn("1", "a"), turn(CrewFailedError, "b", run=2, text="bad"), turn("2 after 1", "c", run=3)), 3, crew=FLOW),
    Row("an uncertain turn is in the way", (turn(KickoffUncertainError, "a", run=None), Call(SessionBlockedError, None, "b", says=("-a", "prefect-crew runs resolve"), options=TURN), turn("1 after ", "c", run=2, session="other")), 2, crew=SLOW_FLOW, faults=("kickoff:500-after-accept@1",)),
    Row("a forgotten turn is in the way until it is resolved", (Call(CrewLostError, None, "a", options=TURN | FORGETFUL), Call(SessionBlockedError, None, "b", says=("{run1}",), options=TURN | SHORT), Command("runs resolve {key} --lost --yes --crew", key="a"), Server(), turn("1 after ", "c", run=2)), 2, crew=SLOW_FLOW, faults=("status:forgotten@2-4",)),
    Row("a turn has its session for ever", (turn("1", "a"), Call(IdempotencyConflictError, None, "a", options={"session": "other"}), Call(IdempotencyConflictError, None, "a"), turn("1", "a")), 1, crew=FLOW),
    Row("a session of a crew that is no Flow", (turn(ConfigurationError, "a", run=None),), 0),
    # Batches: a row is a run.
    Row("a batch", (Batch(("a", "b", "c"), {"completed": 3, "kickoffs": 3}, lines=3), Batch(("a", "b", "c"), {"completed": 3, "kickoffs": 0}, lines=3)), 3, formats=BOTH),
    Row("a batch with a row that fails", (Batch(("a", "bad", "c"), {"completed": 2, "failed": 1}, lines=3), Batch(("a", "bad", "c"), {"completed": 2, "failed": 1, "kickoffs": 1})), 4, crew=PICKY),
    Row("a batch that stops and goes on", (Batch(("bad", "b", "c"), {"failed": 1, "completed": 0, "skipped": 2, "kickoffs": 1}, options={"on_failure": "stop", "max_in_flight": 1}), Batch(("bad", "b", "c"), {"failed": 1, "completed": 2, "kickoffs": 3})), 4, crew=PICKY),
    Row("a batch with an uncertain row", (Batch(("a", "b", "c"), {"completed": 2, "uncertain": 1}), Batch(("a", "b", "c"), {"completed": 2, "uncertain": 1, "kickoffs": 0})), 3, faults=("kickoff:drop-after-accept@2",)),
    Row("a batch at a busy server", (Batch(("a", "b", "c"), {"completed": 3}),), 3, 5, faults=("kickoff:429=0.2@1-2",)),
    Row("two callers of one batch", (Together((Batch(("a", "b"), {"completed": 2}), After(1, Batch(("a", "b"), gives=CrewError)))),), 2, crew=LONGER),
)
# fmt: on


def cases() -> list[object]:
    """Return each row with each response format that it names."""
    return [pytest.param(row, form, id=f"{row.name}, {form}") for row in ROWS for form in row.formats]


@pytest.mark.parametrize(("row", "response_format"), cases())
def test_what_comes_of(row: Row, response_format: str, tmp_path: Path) -> None:
    play(row, response_format, tmp_path)
