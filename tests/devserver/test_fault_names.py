"""What a fault's text means, and what is said of texts that mean nothing."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_crew.devserver import Fault, FaultError, Faults
from prefect_crew.devserver.faults import FAULTS, PLACES


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kickoff:drop-after-accept@1", Fault("kickoff", "drop-after-accept", on=1)),
        ("status:500%0.1", Fault("status", "500", probability=0.1)),
        ("status:429=2.5@2-4", Fault("status", "429", on="2-4", value=2.5)),
        ("any:latency", Fault("any", "latency", value=1.0)),
        ("webhook-crew:lose", Fault("webhook-crew", "lose")),
        (" kickoff:no-id ", Fault("kickoff", "no-id")),
    ],
)
def test_text_and_object_are_the_same(text: str, fault: Fault) -> None:
    parsed = Fault.parse(text)
    assert (parsed.where, parsed.name, parsed.value, parsed.probability) == (
        fault.where,
        fault.name,
        fault.value,
        fault.probability,
    )
    assert [n for n in range(1, 9) if parsed.hits(n, "7")] == [n for n in range(1, 9) if fault.hits(n, "7")]
    assert str(parsed) == text.strip()


@pytest.mark.parametrize(
    ("on", "hits"),
    [
        (None, [1, 2, 3, 4, 5, 6]),
        (2, [2]),
        ((1, 4), [1, 4]),
        ("3", [3]),
        ("1,4", [1, 4]),
        ("2-4", [2, 3, 4]),
        ("5-", [5, 6]),
    ],
)
def test_occurrences(on: int | str | tuple[int, ...] | None, hits: list[int]) -> None:
    faults = Faults([Fault("status", "500", on=on)])
    assert [n for n in range(1, 7) if faults.draw("status", "any")] == hits
    assert [fired.occurrence for fired in faults.fired] == hits


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("500", False),
        ("500-before-accept", False),
        ("500-after-accept", True),
        ("drop-after-accept", True),
        ("no-id", True),
        ("no-id-before-accept", False),
        ("429-bare", False),
    ],
)
def test_before_and_after(name: str, after: bool) -> None:
    assert Fault("kickoff", name).after is after


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("kickof:500", "There is no place 'kickof'", id="unknown-place"),
        pytest.param("kickof:500", "kickoff, status, resume", id="places-are-listed"),
        pytest.param("kickoff:explode", "There is no fault 'explode'", id="unknown-name"),
        pytest.param("kickoff:explode", "drop, reset, timeout", id="names-are-listed"),
        pytest.param("status:no-id", "no-id is no fault of status. Its places: kickoff", id="elsewhere"),
        pytest.param("kickoff:lose", "lose is no fault of kickoff", id="webhook-fault-at-a-call"),
        pytest.param("kickoff:latency-after-accept", "There is no fault", id="no-phase"),
        pytest.param("kickoff:drop=3", "takes no value", id="value-for-nothing"),
        pytest.param("kickoff:latency=-1", "takes a number of 0 or more", id="negative"),
        pytest.param("kickoff:latency=nan", "takes a number of 0 or more", id="not-a-number"),
        pytest.param("kickoff:latency=soon", "is not a number", id="word-for-number"),
        pytest.param("kickoff:500%2", "between 0 and 1", id="probability"),
        pytest.param("kickoff:500@0", "says not when", id="count-from-1"),
        pytest.param("kickoff:500@4-2", "says not when", id="backwards"),
        pytest.param("kickoff:500@last", "says not when", id="word-for-when"),
        pytest.param("500", "is not a fault. Write PLACE:NAME", id="no-place"),
        pytest.param("", "is not a fault. Write PLACE:NAME", id="empty"),
    ],
)
def test_errors_say_what_there_is(text: str, said: str) -> None:
    with pytest.raises(FaultError, match=said):
        Fault.parse(text)


@given(st.text(max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(FaultError):
        Fault.parse(text)


@given(st.sampled_from(PLACES), st.sampled_from(sorted(FAULTS)))
def test_every_kind_is_a_fault_of_its_places_and_of_no_other(where: str, name: str) -> None:
    if where in FAULTS[name].places:
        assert Fault.parse(f"{where}:{name}").kind is FAULTS[name]
    else:
        with pytest.raises(FaultError):
            Fault(where, name)


def drawn(faults: list[str], seed: int, visits: int = 200) -> list[list[str]]:
    book = Faults(faults, seed=seed)
    return [[str(fault) for fault in book.draw("status", "any")] for _ in range(visits)]


def test_the_same_seed_gives_the_same_faults() -> None:
    assert drawn(["status:500%0.3"], 7) == drawn(["status:500%0.3"], 7)
    assert drawn(["status:500%0.3"], 7) != drawn(["status:500%0.3"], 8)
    assert 30 < sum(map(bool, drawn(["status:500%0.3"], 7))) < 90


def test_a_fault_does_not_change_when_others_come() -> None:
    alone = drawn(["status:500%0.3"], 7)
    beside = drawn(["status:500%0.3", "any:latency%0.5"], 7)
    assert [["status:500%0.3"] if "status:500%0.3" in met else [] for met in beside] == alone


def test_faults_come_and_go() -> None:
    faults = Faults()
    assert faults.draw("kickoff", "any") == []
    faults.add("kickoff:500", Fault("any", "latency"))
    assert len(faults.draw("kickoff", "any")) == 2
    faults.clear()
    assert faults.draw("kickoff", "any") == []
    assert faults.visits["kickoff"] == 3


def test_occurrences_count_from_when_the_fault_was_added() -> None:
    faults = Faults(["status:500@1"])
    met = [[fault.name for fault in faults.draw("status", "any")] for _ in range(2)]
    faults.add("status:502@1")
    met += [[fault.name for fault in faults.draw("status", "any")] for _ in range(2)]
    assert met == [["500"], [], ["502"], []]
