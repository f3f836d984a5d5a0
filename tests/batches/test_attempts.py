"""What a write of an attempt may replace: the whole table, and the writes of one commit, without a database."""

import itertools
from typing import Any

import pytest

from prefect_crew.batches.attempts import Attempt, Write, decide_writes, may_follow
from prefect_crew.batches.outcomes import RowState
from prefect_crew.records.model import RecordPhase

CLAIMED, NOT_STARTED, UNCERTAIN = RecordPhase.CLAIMED, RecordPhase.NOT_STARTED, RecordPhase.UNCERTAIN
STARTED, ENDED = RecordPhase.STARTED, RecordPhase.ENDED
STATES = {phase: RowState(phase) for phase in (CLAIMED, NOT_STARTED, UNCERTAIN, STARTED)} | {ENDED: RowState.COMPLETED}
NOW = 1_000_000.0
TABLE = {
    CLAIMED: {CLAIMED: "owner", UNCERTAIN: "owner, over", NOT_STARTED: "owner, over", STARTED: "owner, over",
              ENDED: "owner, over"},
    UNCERTAIN: {UNCERTAIN: "always", NOT_STARTED: "over", STARTED: "always", ENDED: "always"},
    NOT_STARTED: {NOT_STARTED: "always", STARTED: "always", ENDED: "always"},
    STARTED: {STARTED: "same id", ENDED: "same id"},
    ENDED: {ENDED: "same id"},
}  # fmt: skip
"""For a stored phase and a written one: when the ledger takes the write. A pair that is left out: never.

`owner`: the writer holds the claim. `over`: no kickoff can be on its way any more. `same id`: as stored."""


def attempt(phase: RecordPhase, *, key: str = "k", owner: str = "me", **columns: Any) -> Attempt:
    values: dict[str, Any] = {"state": STATES[phase], "kickoff": None, "record": f"{phase}", **columns}
    return Attempt("b", key, 1, phase, owner=owner, **values)


@pytest.mark.parametrize("before", RecordPhase)
@pytest.mark.parametrize("after", RecordPhase)
def test_the_table_of_what_may_follow_what(before: RecordPhase, after: RecordPhase):
    """All combinations that the rule knows, against the table and its four exceptions."""
    owners, expectations, ids, either = ("me", "another"), (None, before, STARTED), (None, "1", "2"), (False, True)
    values = (*(either,) * 5, owners, expectations, ids[:2], ids, (None, NOW, NOW + 0.1))
    for row in itertools.product(*values):
        is_lost, same_record, by_owner, is_first, is_held, owner, expected, stored_id, new_id, until = row
        state = RowState.LOST if is_lost and before is ENDED else STATES[before]
        stored = attempt(before, kickoff=stored_id, posts_until=until, state=state)
        new = attempt(after, kickoff=new_id, owner=owner, record=stored.record if same_record else "new")
        write = Write(new, by_owner=by_owner, expected=expected, is_first=is_first)
        facts = {"owner": by_owner, "over": until != NOW + 0.1, "same id": new_id == stored_id, "always": True}
        may = any(facts[word] for word in TABLE[before].get(after, "").split(", ") if word)
        may &= owner == "me"
        may &= expected in (None, before) or same_record
        may &= not (is_first and is_held)
        may &= not (is_first and before is ENDED and not is_lost and not same_record)
        assert may_follow(stored, write, now=NOW, is_held=is_held) is may, (stored, write, is_held)
    assert not may_follow(None, Write(attempt(after), by_owner=True), now=NOW), "nobody has claimed it"
    for owner in owners:
        claim = Write(attempt(CLAIMED, owner=owner), is_claim=True)
        assert may_follow(attempt(before), claim, now=NOW) is (before is CLAIMED and owner == "me")
        assert may_follow(None, claim, now=NOW)


def test_a_lost_run_has_no_end_that_replaces_an_end_of_its_server():
    seen, lost = (attempt(ENDED, kickoff="1", state=state) for state in (RowState.COMPLETED, RowState.LOST))
    assert not may_follow(seen, Write(lost, by_owner=True), now=NOW)
    assert may_follow(lost, Write(seen), now=NOW)


def test_the_writes_of_one_commit_are_made_in_their_order():
    stored = [attempt(CLAIMED, posts_until=NOW + 5.0)]
    writes = [
        Write(attempt(UNCERTAIN), by_owner=True),
        Write(attempt(NOT_STARTED)),  # too early, for whoever found it out
        Write(attempt(STARTED, kickoff="1"), is_first=True),
        Write(attempt(UNCERTAIN), by_owner=True),  # an id was on record in between
        Write(attempt(ENDED, kickoff="1"), is_first=True),
        Write(attempt(ENDED, kickoff="1", record="another end"), is_first=True),
    ]
    answers, changed = decide_writes(stored, writes, now=NOW)
    assert answers == [True, False, True, False, True, False]
    assert list(changed.values()) == [attempt(ENDED, kickoff="1")]


def test_of_two_claims_of_one_place_the_first_wins_and_may_be_made_again():
    mine, theirs = attempt(CLAIMED), attempt(CLAIMED, owner="them")
    writes = [Write(claim, good_for=30.0, is_claim=True) for claim in (mine, theirs, mine)]
    answers, changed = decide_writes([], writes, now=NOW)
    assert answers == [True, False, True]
    assert list(changed.values()) == [mine._replace(posts_until=NOW + 30.0)]
    again, changed = decide_writes(changed.values(), writes[:1], now=NOW + 20.0)
    assert again == [True]
    assert list(changed.values()) == [mine._replace(posts_until=NOW + 30.0)], "its time goes on"


def test_an_uncertain_kickoff_is_on_its_way_as_long_as_its_claim_said():
    claim = attempt(CLAIMED, posts_until=NOW + 5.0)
    for write, until in (
        (Write(attempt(UNCERTAIN), 60.0, by_owner=True), NOW + 5.0),
        (Write(attempt(CLAIMED), 60.0, by_owner=True), NOW + 60.0),  # a further permit, after a 429
        (Write(attempt(NOT_STARTED), 60.0, by_owner=True), None),
    ):
        _, changed = decide_writes([claim], [write], now=NOW)
        assert changed[claim.place].posts_until == until


def test_one_kickoff_id_belongs_to_one_attempt_also_of_another_batch_and_within_a_commit():
    elsewhere = attempt(STARTED, kickoff="1")._replace(batch="c")
    stored = [attempt(CLAIMED, key=key) for key in "kmn"] + [elsewhere]
    writes = [
        Write(attempt(STARTED, key="k", kickoff="1"), by_owner=True, is_first=True),
        Write(attempt(STARTED, key="m", kickoff="2"), by_owner=True, is_first=True),
        Write(attempt(STARTED, key="n", kickoff="2"), by_owner=True, is_first=True),
        Write(attempt(STARTED, key="m", kickoff="2"), is_first=True),  # as by a commit that is made again
        Write(attempt(ENDED, key="n"), by_owner=True, is_first=True),  # two that have none share nothing
    ]
    answers, changed = decide_writes(stored, writes, now=NOW)
    assert answers == [False, True, False, True, True]
    assert [key for _, key, _ in changed] == ["m", "n"]


def test_an_id_that_an_attempt_gives_back_is_free_within_the_commit():
    stored = [attempt(STARTED, key="k", kickoff="1"), attempt(CLAIMED, key="m")]
    writes = [
        Write(attempt(ENDED, key="k", kickoff="1"), by_owner=True),
        Write(attempt(STARTED, key="m", kickoff="1"), by_owner=True, is_first=True),
    ]
    assert decide_writes(stored, writes, now=NOW)[0] == [True, False]
    stored = [attempt(UNCERTAIN, key="k", kickoff="1"), attempt(CLAIMED, key="m")]
    given_back = Write(attempt(NOT_STARTED, key="k"), by_owner=True)
    assert decide_writes(stored, [given_back, writes[1]], now=NOW)[0] == [True, True]
