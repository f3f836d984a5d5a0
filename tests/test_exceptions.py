"""Every error says what happened, to which run and what to do; survives pickling; and the tree of them is true."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import prefect_crew
from prefect_crew import exceptions
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import CrewError

PUBLIC: dict[str, type[CrewError]] = {name: getattr(exceptions, name) for name in exceptions.__all__}
GOLDEN: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "golden" / "messages.yaml").read_text("utf-8"))


def error_of(case: dict[str, Any]) -> CrewError:
    """Return the error of a golden message, of whose facts some are no YAML."""
    facts = dict(case["facts"])
    first = [facts.pop("text")] if "text" in facts else []
    if "times" in facts:
        facts["body"] *= facts.pop("times")
    if "rows" in facts:
        facts["rows"] = [BadRow(*row) for row in facts["rows"]]
    if "errors" in facts:
        facts["errors"] = {step: ValueError(text) for step, text in facts["errors"].items()}
    return PUBLIC[case["error"]](*first, **facts)


ERRORS = [
    *map(error_of, GOLDEN),
    *(kind("It is odd. Do this.") for kind in PUBLIC.values() if kind.__init__ is CrewError.__init__),
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["error"])
def test_the_text_of_every_error_with_facts_is_golden(case: dict[str, Any]):
    text = str(error_of(case))
    assert text == case["message"]
    assert ".." not in text
    assert len(text) <= 800


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives(error: CrewError, again: Any):
    found = again(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert repr(vars(found)) == repr(vars(error))


# The tree


def test_every_error_is_tried_and_exported():
    assert {type(error) for error in ERRORS} == set(PUBLIC.values())
    assert exceptions.__all__ == sorted(PUBLIC)
    assert all(getattr(prefect_crew, name) is kind for name, kind in PUBLIC.items())


def test_the_tree_in_the_docstring_is_the_tree():
    lines = (re.match(r"( {4}[│├└─ ]*)([A-Z]\w+)", line) for line in (exceptions.__doc__ or "").splitlines())
    drawn = [(len(found.group(1)), found.group(2)) for found in lines if found]
    assert {name for _, name in drawn} == set(PUBLIC)
    parents: dict[int, str] = {}
    for depth, name in drawn:
        parents[depth] = name
        above = [parents[other] for other in sorted(parents) if other < depth]
        assert not above or issubclass(PUBLIC[name], PUBLIC[above[-1]])
