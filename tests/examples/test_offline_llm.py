"""The offline model says the same twice, and counts what it says."""

from __future__ import annotations

import asyncio
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from prefect_crew.devserver._crewai_runner import prepare_crewai

    prepare_crewai()
    sys.path.insert(0, EXAMPLES)
    from offline_llm import OfflineLLM

    yield OfflineLLM
    sys.path.remove(EXAMPLES)


PROMPT = "Current Task: Write a walk in Porto: bridges, wine and tiles.\n\nThis is the expected criteria: short."


def test_the_answer_is_made_of_the_task(kind: Any) -> None:
    answer = kind(model="offline").call(PROMPT)
    assert answer.splitlines()[0] == "## A walk in Porto"
    assert [line.split("**")[1] for line in answer.splitlines()[2:]] == ["Bridges", "Wine", "Tiles"]
    assert kind(model="offline").call([{"role": "user", "content": PROMPT}]) == answer
    assert asyncio.run(kind(model="offline").acall(PROMPT)) == answer


def test_earlier_notes_and_feedback_are_taken_up(kind: Any) -> None:
    prompt = f"{PROMPT}\n\nThis is the context you're working with:\nbring shoes\n\nProvide your complete response:"
    answer = kind(model="offline").call(f"{prompt}\n\nUser feedback: name the river\nInstructions: use it.")
    assert "> bring shoes" in answer
    assert answer.endswith("- name the river")


def test_tokens_are_counted_over_the_model_s_life(kind: Any) -> None:
    llm = kind(model="offline")
    answer = llm.call(PROMPT)
    once = llm.get_token_usage_summary()
    assert (once.prompt_tokens, once.completion_tokens) == (len(PROMPT.split()), len(answer.split()))
    llm.call(PROMPT)
    assert llm.get_token_usage_summary().total_tokens == 2 * once.total_tokens


def test_a_failing_model_fails_each_time(kind: Any) -> None:
    llm = kind(model="offline", error="no such model")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such model"):
            llm.call(PROMPT)


def test_a_structured_answer_fits_its_model(kind: Any) -> None:
    from pydantic import BaseModel

    class Colour(Enum):
        RED = "red"
        BLUE = "blue"

    class Stop(BaseModel):
        name: str
        nice: bool

    class Walk(BaseModel):
        title: str
        stops: list[Stop]
        count: int
        colour: Colour
        verdict: Literal["rejected", "approved"]
        more: str | None

    walk = kind(model="offline").call(f"{PROMPT}\n\nFeedback: Approved, in blue", response_model=Walk)
    assert isinstance(walk, Walk)
    assert [stop.name.partition(":")[0] for stop in walk.stops] == ["Bridges", "Wine", "Tiles"]
    assert (walk.count, walk.colour, walk.verdict) == (3, Colour.BLUE, "approved")
    assert os.environ["CREWAI_DISABLE_TELEMETRY"] == "true"
