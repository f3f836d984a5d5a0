"""How a batch stands while it runs: counts, durations, failures, in memory that does not grow with the rows."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prefect_crew.api.models import TokenUsage
from prefect_crew.batches.ends import FINAL, RowEnd
from prefect_crew.batches.set_aside import SetAside

__all__ = ["FAILURES", "Failure", "Standing"]

FAILURES = 100
"""Failed rows that are kept for the artifact; the output has all."""
UNCERTAIN_KEYS = 1_000
SLOWEST = 10
DURATIONS = 100_000
"""Durations that are kept for percentiles: of more rows, every second, every fourth and so on."""
RECENT = 60.0
"""Seconds over which the rate is taken."""


@dataclass(frozen=True)
class Failure:
    """A row that failed, for people."""

    key: str
    kickoff_id: str | None
    state: str
    error: str
    kind: str | None


@dataclass
class Standing:
    """The counts of all calls of a batch so far. Durations are seconds from a kickoff to the end that was seen.

    Attributes:
        total: Rows that can be run. `set_aside`: those that cannot; `duplicates`: how many equal an earlier one.
        completed, failed, uncertain: How they stand.
        in_flight: Runs that are waited for. `people`: those of them that wait for a person.
        ended_here: Rows that ended in this call.
        failures, uncertain_keys, slowest: The first ones, or the worst.
        errors: Failures of this call by the class of their error.
    """

    total: int
    set_aside: SetAside = field(default_factory=SetAside)
    duplicates: int = 0
    completed: int = 0
    failed: int = 0
    uncertain: int = 0
    in_flight: int = 0
    people: int = 0
    kickoffs: int = 0
    ended_here: int = 0
    started: float = field(default_factory=time.monotonic)
    failures: list[Failure] = field(default_factory=list[Failure])
    uncertain_keys: list[str] = field(default_factory=list[str])
    slowest: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    errors: Counter[str] = field(default_factory=Counter[str])
    _unfinished: int = 0
    _durations: array[float] = field(default_factory=lambda: array("d"))
    _every: int = 1
    _measured: int = 0
    _usage: Counter[str] = field(default_factory=Counter[str])
    _marks: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    @property
    def done(self) -> int:
        """Rows of which nothing more is expected."""
        return self.completed + self.failed + self.uncertain

    @property
    def whole(self) -> int:
        """All rows of the data set but duplicates, also those that cannot be run."""
        return self.total + self.set_aside.count

    @property
    def over(self) -> bool:
        """Whether every row has ended for good: another call would find nothing to do."""
        return self.completed + self.failed == self.total and not self._unfinished

    @property
    def seconds(self) -> float:
        """How long this call has taken."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows that end a second, over the last minute."""
        at, ended = self._marks[0] if self._marks else (self.started, 0)
        return (self.ended_here - ended) / max(time.monotonic() - at, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate; None while that is unknown."""
        rate = self.rate
        return (self.total - self.done) / rate if rate > 0 else None

    @property
    def durations(self) -> Sequence[float]:
        """Durations for percentiles, all of them or a regular sample."""
        return self._durations

    @property
    def usage(self) -> TokenUsage | None:
        """The sum of what the server reported, None where it reported nothing."""
        return TokenUsage(**self._usage) if self._usage else None

    def tick(self) -> None:
        """Remember how many had ended now, for the rate."""
        now = time.monotonic()
        self._marks.append((now, self.ended_here))
        while len(self._marks) > 2 and now - self._marks[1][0] > RECENT:
            self._marks.pop(0)

    def take(self, end: RowEnd) -> None:
        """Take in how a row stands."""
        self.ended_here += not end.found
        record = end.record
        if end.uncertain:
            self.uncertain += 1
            if len(self.uncertain_keys) < UNCERTAIN_KEYS:
                self.uncertain_keys.append(end.job.key)
            return
        if end.completed:
            self.completed += 1
        else:
            self.failed += 1
            self._unfinished += end.state not in FINAL
            if end.kind is not None and not end.found:
                self.errors[end.kind] += 1
            if len(self.failures) < FAILURES:
                run = None if record is None else record.kickoff_id
                self.failures.append(Failure(end.job.key, run, end.state, end.error or end.state, end.kind))
        if record is None:
            return
        if record.result is not None and record.result.usage is not None:
            self.add_usage({name: count for name, count in record.result.usage if count is not None})
        if record.kicked_off_at is not None and record.ended_at is not None:
            self.add_durations([(end.job.key, (record.ended_at - record.kicked_off_at).total_seconds())])

    def add_usage(self, reported: Mapping[str, int]) -> None:
        """Add what runs have used."""
        self._usage.update(reported)

    def recall(self, sample: Iterable[float], slowest: Iterable[tuple[float, str]]) -> None:
        """Take how long rows took from a batch that is done."""
        self._durations = array("d", sample)
        self.slowest = list(slowest)

    def add_durations(self, rows: Iterable[tuple[str, float]]) -> None:
        """Add how long rows took, by their keys."""
        for key, seconds in rows:
            self._measured += 1
            if self._measured % self._every == 0:
                self._durations.append(seconds)
                if len(self._durations) > DURATIONS:
                    self._durations = self._durations[::2]
                    self._every *= 2
            if len(self.slowest) < SLOWEST or seconds > self.slowest[-1][0]:
                self.slowest = sorted([*self.slowest, (seconds, key)], reverse=True)[:SLOWEST]
