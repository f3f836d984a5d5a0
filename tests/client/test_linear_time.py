"""Time grows no faster than the text: no parser and no renderer can be stopped by what a crew wrote.

Times are compared with each other, never with a clock: four times the text may take `ALLOWED` times as long, and what
is quadratic takes sixteen. Only growth beyond a floor counts, since what takes no time at all has no growth.
"""

import asyncio
import contextlib
import json
import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prefect_crew.artifacts.escape import cell, code, fenced, prose, reading
from prefect_crew.artifacts.run import RunView, render_run
from prefect_crew.client._parsing import parse_retry_after, waiting_output
from prefect_crew.client.models import CrewStatus, TaskResult
from prefect_crew.exceptions import CrewError
from prefect_crew.receiver.events import read_events
from prefect_crew.states import CrewState
from support.transports import ask

ALLOWED = 9.0
FLOOR = 0.02
"""CPU seconds that the larger text may take in any case."""
SIZE = 16_000
"""Characters of the smaller text."""

Call = Callable[[str], object]


def read_of(kind: str, status_code: int = 200) -> Callable[[bytes], object]:
    """Return what reads a body: of a webhook , or of an answer to a call."""
    if kind in ("human_input", "stream"):
        return lambda body: read_events(kind, body)
    return lambda body: asyncio.run(ask(kind, body, status_code))


def rendered(text: str, state: CrewState = CrewState.COMPLETED) -> str:
    task = TaskResult(name=text, agent=text, output=text)
    texts: dict[str, Any] = dict.fromkeys(("output", "message", "current_task", "error"), text)
    status = CrewStatus(kickoff_id="k", state=state, tasks=[task, task], **texts)
    inputs = {"text": text.encode("utf-8", "replace").decode()}
    return render_run(RunView(text, "k", text, state, inputs=inputs, status=status, notes=[text]))


def body_with(key: str, text: str) -> bytes:
    value = [text, {"output": text, "msg": text}] if key in ("tasks", "error") else text
    return json.dumps({"state": "SUCCESS", "kickoff_id": "run-1", key: value}).encode()


CALLS: dict[str, Call] = {
    "waiting output": lambda text: waiting_output({"output": text, "current_task": text}),
    "error header": parse_retry_after,
    "rendered": rendered,
    "rendered failure": lambda text: rendered(text, CrewState.FAILED),
    **{function.__name__: function for function in (reading, cell, prose, code, fenced)},
}
for name, keys in {
    "inputs": "inputs",
    "kickoff": "id",
    "kickoff 422": "detail",
    "status": "result output message result_json status tasks error",
    "resume": "message",
    "stop": "detail",
    "stop 400": "detail",
    "stop 404": "detail",
    "human_input": "output task_id",
    "stream": "id type",
}.items():
    kind, _, code_of_answer = name.partition(" ")
    read = read_of(kind, int(code_of_answer or 200))
    CALLS[name] = lambda text, read=read: read(text.encode("utf-8", "surrogatepass"))
    for key in keys.split():
        CALLS[f"{name} {key}"] = lambda text, read=read, key=key: read(body_with(key, text))

# What makes a backtracking pattern begin anew, or a scan start over, at every place.
FRAGMENTS = [
    "`", "``", "```", "~", "~~~", "!", "![", "](", "](&a", "]:", "[", "<", "<h1", "<title ", "</h1 ", ">", "&", "&#",
    "&#9", "\\", "\\u", '"', '\\"', "{", '{"a":', "[1,", "9", "-", "1e", ".", ",", ":", "|", "|~", " ", "\t", "\n",
    "\r\n",    "\u2028", "```\n", "\n```", "current state ", "current state: a ", "a", "\x00", "\u202e", "\ud800", "é",
]  # fmt: skip
PARTS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=3).map("".join)


def seconds(call: Call, text: str) -> float:
    """Return the CPU seconds of a call, the least of three. `timeit` keeps the collector away."""

    def run() -> None:
        with contextlib.suppress(CrewError):  # an answer to an odd body like any other
            call(text)

    return min(timeit.repeat(run, timer=time.process_time, repeat=3, number=1))


def assert_linear(call: Call, head: str, repeated: str, tail: str, size: int = SIZE) -> None:
    """Compare n with 4n; where that looks bad, 4n with 16n, since small times are noise."""
    for smaller in (size, 4 * size):
        texts = [head + repeated * max(count // len(repeated), 1) + tail for count in (smaller, 4 * smaller)]
        small, large = (seconds(call, text) for text in texts)
        if large < FLOOR or large < ALLOWED * small:
            return
    pytest.fail(f"{head!r} {repeated!r} {tail!r}: {small:.3f} s, and {large:.3f} s for four times the text")


@pytest.mark.parametrize(
    ("call", "head", "repeated", "tail"),
    [
        pytest.param("status result", "```json\n", " ", "x", id="fence-and-blanks"),
        pytest.param("human_input output", "```\n", " ", "x", id="fence-in-a-webhook"),
        pytest.param("reading", "", "](&a", "", id="links-without-an-end"),
        pytest.param("reading", "", "](", "", id="links-of-links"),
        pytest.param("reading", "](", " ", "", id="a-link-to-blanks"),
        pytest.param("reading", "", "!", "", id="exclamation-marks"),
        pytest.param("reading", "", "~", "|", id="tildes"),
        pytest.param("reading", "", "`", "|", id="backticks"),
    ],
)
def test_known_texts(call: str, head: str, repeated: str, tail: str):
    assert_linear(CALLS[call], head, repeated, tail)


@pytest.mark.parametrize("call", CALLS)
# What is slow is not made shorter: that would take minutes, and the fragments tell enough.
@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(head=PARTS, repeated=PARTS, tail=PARTS)
def test_any_repeated_text(call: str, head: str, repeated: str, tail: str):
    assert_linear(CALLS[call], head, repeated, tail)
