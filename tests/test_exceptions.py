"""Every error survives pickling and copying, is exported, and stands in the tree of the docstring."""

import copy
import pickle
import re
from typing import Any

import pytest

import prefect_crew
from prefect_crew import exceptions
from prefect_crew.exceptions import CrewError

PUBLIC: dict[str, type[CrewError]] = {name: getattr(exceptions, name) for name in exceptions.__all__}
RUN = {"kickoff_id": "r1", "crew": "travel", "idempotency_key": "my key"}
ERRORS: list[CrewError] = [
    exceptions.CrewFailedError(error="no tools", **RUN),
    exceptions.CrewStoppedError(**RUN),
    exceptions.CrewLostError(last_state="running", **RUN),
    exceptions.BatchBusyError(name="leads"),
    exceptions.DatasetError("is empty.", source="leads.csv", line=3),
    exceptions.CrewAPIError("GET /inputs answered 500", status_code=500, retry_after=3.0),
]
ERRORS += [kind("It is odd. Do this.") for kind in PUBLIC.values() if kind.__init__ is CrewError.__init__]


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives(error: CrewError, again: Any):
    found = again(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_an_error_about_a_run_names_it_and_the_next_step():
    failed, stopped, lost, *_ = map(str, ERRORS)
    assert failed == (
        "Run r1 of crew travel failed: no tools. Correct the crew, then run again with the same key, which starts "
        "another run."
    )
    assert stopped == "Run r1 of crew travel was stopped before it had a result. Run again to start another."
    assert "it was last seen running" in lost
    assert "prefect-crew runs resolve 'my key' --lost" in lost


def test_text_of_a_crew_cannot_control_a_terminal():
    assert "\x1b" not in str(exceptions.CrewFailedError(error="\x1b[2Jall is well", **RUN))


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
