"""What tells one question from the next."""

from datetime import timedelta
from typing import Any

import pytest

from prefect_crew.client._parsing import parse_status
from prefect_crew.client.models import CrewStatus, Review, ReviewRequest
from prefect_crew.records.model import utcnow
from prefect_crew.runs.reviews.questions import (
    QuestionState,
    digest,
    is_same_question,
    judged_output,
    output_digest,
    question_state,
)
from prefect_crew.states import CrewState


def waiting(**fields: Any) -> CrewStatus:
    raw = {"state": "PENDING_HUMAN_INPUT", **{key: value for key, value in fields.items() if key == "task_output"}}
    known = {key: value for key, value in fields.items() if key != "task_output"}
    return CrewStatus(kickoff_id="k", state=CrewState.WAITING, human_task_id="draft", raw=raw, **known)


def test_a_question_is_known_by_its_output() -> None:
    assert output_digest(waiting(message="1 s", last_step="a")) is None
    first = output_digest(waiting(message="1 s", last_step="a", task_output="text"))
    assert first == output_digest(waiting(message="2 s", last_step="b", task_output="text"))
    assert first != output_digest(waiting(task_output="another"))


def sent(**fields: Any) -> Review:
    at = utcnow() - timedelta(seconds=fields.pop("age", 1))
    given = {"task_id": "draft", "round": 1, "approve": True, "by": "Ada", "outcome": "sent"}
    marks = {"task_digest": digest("draft"), "shown_task_digest": digest("draft")}
    return Review(**{**given, **marks, "at": at, **fields})


CASES: dict[str, tuple[list[Review], dict[str, Any], QuestionState]] = {
    "nobody has answered": ([], {}, "open"),
    "the same, a moment ago": ([sent()], {}, "answered"),
    "the same, long ago": ([sent(age=9e6)], {}, "answered"),
    "another output": ([sent(output_digest="a")], {"shown": "b"}, "open"),
    "an output that came to be shown": ([sent()], {"shown": "b"}, "answered"),
    "an output that is not shown any more": ([sent(output_digest="a")], {}, "answered"),
    "another task": ([sent()], {"task": "print"}, "open"),
    "a task that is not named": ([sent()], {"task": None}, "answered"),
    "answered under a name of the caller's": ([sent(task_id="7f3a", task_digest=digest("7f3a"))], {}, "answered"),
    "another state in between": ([sent(moved_on=True)], {}, "open"),
    "a webhook of the next one": ([sent()], {"has_webhook": True}, "open"),
    "uncertain, long ago": ([sent(outcome="uncertain", age=9e6)], {}, "uncertain"),
    "being sent, or its sender died": ([sent(outcome="intended", age=9e6)], {}, "uncertain"),
    "uncertain, and another output": ([sent(outcome="uncertain", output_digest="a")], {"shown": "b"}, "open"),
    "uncertain, and another state in between": ([sent(outcome="uncertain", moved_on=True)], {}, "open"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_state_of_a_question(case: tuple[Any, dict[str, Any], QuestionState]) -> None:
    before, given, expected = case
    facts: dict[str, Any] = {"task": "draft", "shown": None, **given}
    assert question_state(before, **facts) == expected


def test_an_earlier_tasks_output_is_not_judged() -> None:
    last = {"name": "research", "output": "facts"}
    body = {"state": "PENDING_HUMAN_INPUT", "task_id": "draft", "last_executed_task": last}
    status = parse_status(body, "k")
    assert status is not None
    assert judged_output(status) is None


def test_a_question_after_another_answer_is_another() -> None:
    """The answer before it was taken back, since the server refused it, and somebody else has its number now."""
    taken_back, answer = sent(task_digest=digest("outline"), outcome="intended", age=9), sent()
    known = taken_back.model_copy(update={"outcome": "sent"})
    first, second, third = (
        ReviewRequest(kickoff_id="k", task_id="draft", answers=(before,)) for before in (taken_back, answer, known)
    )
    assert not is_same_question(first, second)
    assert is_same_question(first, third)
