"""The attempts at rows, as a ledger stores them, and the rule by which a write may replace one. No I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prefect_crew.batches.outcomes import RowState
from prefect_crew.records.model import RANK, RecordPhase

Place = tuple[str, str, int]
"""The batch, the key of the row, and the number of the attempt."""


class Attempt(NamedTuple):
    """One attempt at a row: the columns of `crew_attempts`.

    `kickoff` is a digest of the kickoff id, and `record` the whole record as JSON. Until `posts_until`, in seconds
    since 1970 by the clock of the database, the kickoff of a claim may be sent or be on its way.
    """

    batch: str
    row_key: str
    attempt: int
    phase: RecordPhase
    state: RowState
    kickoff: str | None
    owner: str
    record: str
    posts_until: float | None = None
    seconds: float | None = None
    usage: dict[str, Any] | None = None

    @property
    def place(self) -> Place:
        """The primary key."""
        return self[:3]

    @property
    def counts(self) -> bool:
        """Whether the attempt started a run, or may have started one."""
        return self.phase is not RecordPhase.NOT_STARTED

    @property
    def is_final(self) -> bool:
        """Whether the crew's server has reported the end of the run (`Outcome.is_final`)."""
        return self.phase is RecordPhase.ENDED and self.state is not RowState.LOST

    @property
    def rank(self) -> tuple[int, bool]:
        """The rank of the attempt, as that of an `Outcome`."""
        return RANK[self.phase], self.is_final


class Write(NamedTuple):
    """A write of an attempt.

    Attributes:
        attempt: The attempt as it is to be stored; the ledger sets its `posts_until`.
        good_for: Seconds for which the kickoff of a claim may be sent or be on its way, from the commit.
        is_claim: Whether the write creates the attempt. Else it replaces the stored one.
        by_owner: Whether the writer is the process that has claimed the attempt, and still holds it.
        expected: The phase that the write may replace; None for any phase.
        is_first: Whether the ledger refuses the write if another attempt holds its kickoff id, or an end is on record.
    """

    attempt: Attempt
    good_for: float = 0.0
    is_claim: bool = False
    by_owner: bool = False
    expected: RecordPhase | None = None
    is_first: bool = False


def may_follow(stored: Attempt | None, write: Write, *, now: float, is_held: bool = False) -> bool:
    """Return whether the ledger takes a write.

    As in the log of a run (`fold` of `records.model`), nothing replaces a fact of a higher rank, because a write may
    land late, after others. An attempt of equal rank replaces the attempt, since a ledger stores it as a whole. A write
    may be made again after its commit, since its caller may not know that the commit succeeded.

    Args:
        stored: The attempt in the ledger, None if there is none.
        write: The write.
        now: The time by the clock of the database, which decides the age of a claim.
        is_held: Whether another attempt in the database holds the kickoff id of the write.
    """
    new = write.attempt
    if write.is_claim:
        return stored is None or (stored.owner == new.owner and stored.phase is RecordPhase.CLAIMED)
    if stored is None or stored.owner != new.owner or new.rank < stored.rank:
        return False
    has_changed = write.expected not in (None, stored.phase) or (write.is_first and stored.is_final)
    if (has_changed and new.record != stored.record) or (write.is_first and is_held):
        return False
    may_be_sent = stored.posts_until is not None and stored.posts_until > now
    match stored.phase:
        case RecordPhase.CLAIMED:
            return write.by_owner or (new.phase is not RecordPhase.CLAIMED and not may_be_sent)
        case RecordPhase.UNCERTAIN:  # its sender gave up, but the request may still be on its way
            return new.phase is not RecordPhase.NOT_STARTED or not may_be_sent
        case RecordPhase.NOT_STARTED:
            return True
        case RecordPhase.STARTED | RecordPhase.ENDED:
            return new.kickoff == stored.kickoff


def decide_writes(
    stored: Iterable[Attempt], writes: Sequence[Write], *, now: float
) -> tuple[list[bool], dict[Place, Attempt]]:
    """Decide about the writes of one commit, one after the other.

    Args:
        stored: The attempts at the rows of the writes, and all attempts that hold a kickoff id of a write.
        writes: The writes, in the order in which the callers made them.
        now: The time by the clock of the database.

    Returns:
        For each write whether the ledger takes it, and the attempts that change, by `Attempt.place`.
    """
    attempts = {attempt.place: attempt for attempt in stored}
    holders: defaultdict[str | None, set[Place]] = defaultdict(set)
    for place, attempt in attempts.items():
        holders[attempt.kickoff].add(place)
    answers: list[bool] = []
    changed: dict[Place, Attempt] = {}
    for write in writes:
        new, place = write.attempt, write.attempt.place
        before = attempts.get(place)
        is_held = new.kickoff is not None and not holders[new.kickoff] <= {place}
        is_taken = may_follow(before, write, now=now, is_held=is_held)
        answers.append(is_taken)
        if not is_taken:
            continue
        if before is None or not write.is_claim:
            until = now + write.good_for if new.phase is RecordPhase.CLAIMED else None
            if before is not None:
                holders[before.kickoff].discard(place)
                until = before.posts_until if new.phase is RecordPhase.UNCERTAIN else until
            holders[new.kickoff].add(place)
            attempts[place] = new._replace(posts_until=until)
        changed[place] = attempts[place]  # a claim that is made again changes nothing
    return answers, changed
