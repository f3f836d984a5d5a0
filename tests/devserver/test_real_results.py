"""What CrewAI's results become in the crew API's words."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel

from prefect_crew.devserver.crewai_runner import prepare_crewai

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]


class Trip(BaseModel):
    where: str
    when: date


class Odd:
    def __str__(self) -> str:
        return "odd"


@pytest.mark.parametrize(
    ("value", "text", "data"),
    [
        (None, "", None),
        ("Olá", "Olá", None),
        (3, "3", None),
        (True, "true", None),
        (Odd(), "odd", None),
        ({"a": "ä"}, '{"a": "ä"}', {"a": "ä"}),
        ([1, Odd()], '[1, "odd"]', [1, "odd"]),
        ({"n": float("nan")}, '{"n": null}', {"n": None}),
        (
            Trip(where="Faro", when=date(2026, 5, 1)),
            '{"where": "Faro", "when": "2026-05-01"}',
            {"where": "Faro", "when": "2026-05-01"},
        ),
    ],
    ids=["nothing", "text", "number", "boolean", "object", "dictionary", "list", "not-a-number", "model"],
)
def test_a_result_is_text_and_where_there_is_more_data(value: Any, text: str, data: Any) -> None:
    prepare_crewai()
    from prefect_crew.devserver.crewai_bridge import result_of

    assert result_of(value) == (text, data)


def test_a_crew_s_output_keeps_its_structure_whole() -> None:
    prepare_crewai()
    from crewai.crews.crew_output import CrewOutput
    from crewai.flow import HumanFeedbackResult

    from prefect_crew.devserver.crewai_bridge import result_of

    trip = CrewOutput(raw="text", pydantic=Trip(where="Faro", when=date(2026, 5, 1)))
    assert result_of(trip) == ("text", {"where": "Faro", "when": "2026-05-01"})
    assert result_of(CrewOutput(raw="text")) == ("text", None)
    assert result_of(HumanFeedbackResult(output=trip, feedback="fine")) == result_of(trip)


def test_usage_that_nobody_counted_is_none() -> None:
    prepare_crewai()
    from crewai.types.usage_metrics import UsageMetrics

    from prefect_crew.devserver.crewai_bridge import token_usage

    assert token_usage(UsageMetrics()) is None
    counted = token_usage(UsageMetrics(total_tokens=3, prompt_tokens=2, completion_tokens=1, successful_requests=1))
    assert counted is not None
    assert (counted.total_tokens, counted.cached_prompt_tokens) == (3, 0)


@pytest.mark.parametrize(
    ("emit", "approve", "said", "heard"),
    [
        (None, True, "", ""),
        (None, True, "lovely", "lovely"),
        (None, False, "shorter", "shorter"),
        (None, False, " ", "Rejected"),
        (["yes", "no"], True, "", "Approved"),
        (["yes", "no"], False, "shorter", "Rejected: shorter"),
        (["yes", "no"], False, "No", "No"),
    ],
    ids=["content", "praise", "wish", "bare-rejection", "bare-approval", "choice-with-a-wish", "outcome-by-name"],
)
def test_a_flow_hears_what_it_can_tell_apart(emit: list[str] | None, approve: bool, said: str, heard: str) -> None:
    prepare_crewai()
    from crewai.flow import PendingFeedbackContext

    from prefect_crew.devserver.crewai_bridge import feedback_text
    from prefect_crew.devserver.runs import Answer

    context = PendingFeedbackContext("id", "Flow", "method", "output", "message", emit=emit)
    assert feedback_text(context, Answer(approve=approve, feedback=said)) == heard
