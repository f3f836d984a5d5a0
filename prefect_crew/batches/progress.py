"""How a batch stands: counts, rate, and the artifacts that show them."""

from __future__ import annotations

import statistics
import time
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.artifacts.markdown import cell, code, duration, prose, table
from prefect_crew.artifacts.run import MarkdownArtifact, artifact_key
from prefect_crew.batches.outcomes import FINAL, RowEnd
from prefect_crew.batches.report import BatchReport
from prefect_crew.batches.rows import SetAside
from prefect_crew.client.models import TokenUsage

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


BatchWatch = Callable[[str, str, Standing | None], None]
"""Called with a batch's name, what it does (checking, running, finishing, done), and how it stands, once a second."""

_watches: list[BatchWatch] = []


@contextmanager
def watch_batches(watch: BatchWatch) -> Generator[None]:
    """Call `watch` for every batch that this process runs meanwhile, on whichever event loop runs it.

    It must be quick and must not raise.
    """
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def tell_batch(name: str, phase: str, standing: Standing | None = None) -> None:
    """Tell everyone who watches."""
    for watch in tuple(_watches):
        watch(name, phase, standing)


SHOW_EVERY = 5.0
BAR = 24


class BatchArtifacts:
    """Progress, failures and summary of one batch.

    Args:
        name: The batch.
        crew: What its crew is called.
        show: How much may be shown of what crews say; with "none", no error text.
    """

    def __init__(self, name: str, crew: str, *, show: str) -> None:
        self._name = name
        self._crew = crew
        self._show = show
        own = flow_run_id()
        self._parts = {
            part: MarkdownArtifact(
                artifact_key(f"{name}-{part}", prefix="batch"), f"{part.title()} of batch {name}", flow_run_id=own
            )
            for part in ("progress", "failures", "summary")
        }
        self._shown_at = 0.0
        self._troubled = False

    async def progress(self, standing: Standing, *, now: bool = False) -> None:
        """Show progress, every few seconds at most."""
        if not now and time.monotonic() - self._shown_at < SHOW_EVERY:
            return
        self._shown_at = time.monotonic()
        await self._put("progress", self._progress(standing))

    async def end(self, standing: Standing, report: BatchReport) -> None:
        """Show all three as they stand at the end."""
        await self.progress(standing, now=True)
        await self._put("failures", self._failures(standing))
        await self._put("summary", self._summary(standing, report))

    async def _put(self, part: str, data: str) -> None:
        trouble = await self._parts[part].put(data)
        if trouble and not self._troubled:
            self._troubled = True
            run_logger().warning("The artifacts of batch %s could not be updated: %s", self._name, trouble)

    def _head(self, what: str) -> str:
        return f"## {what} of batch {prose(self._name)} · {prose(self._crew)}"

    def _progress(self, standing: Standing) -> str:
        share = standing.done / standing.whole if standing.whole else 1.0
        full = round(share * BAR)
        over = standing.done >= standing.total
        left = None if over else standing.seconds_left
        rows = [
            ("Done", f"{'█' * full}{'░' * (BAR - full)} {standing.done:,} of {standing.whole:,} ({share:.1%})"),
            ("Completed", f"{standing.completed:,}"),
            ("Failed", f"{standing.failed:,}"),
            ("Uncertain", f"{standing.uncertain:,}"),
            *([("Set aside", f"{standing.set_aside.count:,}")] if standing.set_aside.count else []),
            ("In flight", f"{standing.in_flight:,}"),
            *([("Wait for a person", f"{standing.people:,} · `prefect-crew reviews`")] if standing.people else []),
            ("Rate", f"{standing.rate:.1f} rows/s"),
            ("Time so far", duration(standing.seconds)),
            ("Time left", "–" if left is None else duration(left)),
        ]
        return f"{self._head('Progress')}\n\n{table(('', ''), rows)}\n"

    def _failures(self, standing: Standing) -> str:
        aside = standing.set_aside
        if not standing.failures and not standing.uncertain_keys and not aside.count:
            return f"{self._head('Failures')}\n\nNone.\n"
        parts = [self._head("Failures")]
        if standing.uncertain_keys:
            shown = ", ".join(code(key) for key in standing.uncertain_keys[:FAILURES])
            parts.append(f"**Uncertain**, to be resolved by a person ({standing.uncertain:,}): {shown}")
        if standing.failures:
            rows = [
                (
                    code(one.key),
                    code(one.kickoff_id) if one.kickoff_id else "–",
                    cell(one.state),
                    cell(one.error if self._show != "none" else one.kind or "–"),
                )
                for one in standing.failures
            ]
            parts += [f"The first {len(rows):,} of {standing.failed:,}:", table(("Row", "Run", "State", "Error"), rows)]
        if aside.count:
            bad = [(f"{row.line:,}", cell(row.reason)) for row in aside.rows[:FAILURES]]
            parts += [
                f"**Set aside**, since they cannot be run: {len(bad):,} of {aside.count:,}. All are in "
                f"{code(aside.output or '')}.",
                table(("Line", "Why"), bad),
            ]
        return "\n\n".join(parts) + "\n"

    def _summary(self, standing: Standing, report: BatchReport) -> str:
        rows = [
            ("Rows", f"{report.total:,}"),
            ("Completed", f"{report.completed:,}"),
            ("Failed", f"{report.failed:,}"),
            ("Uncertain", f"{report.uncertain:,}"),
            ("Not run", f"{report.skipped - report.set_aside:,}"),
            *([("Set aside", f"{report.set_aside:,}")] if report.set_aside else []),
            ("Kickoffs of this call", f"{report.kickoffs:,}"),
            ("Time of this call", duration(report.seconds)),
        ]
        if len(standing.durations) > 1:
            marks = statistics.quantiles(standing.durations, n=100, method="inclusive")
            rows += [(f"Duration of a row, p{mark}", duration(marks[mark - 1])) for mark in (50, 90, 99)]
        if report.usage is not None:
            rows += [(name.replace("_", " "), f"{count:,}") for name, count in report.usage if count is not None]
        if report.cost is not None:
            rows.append(("Cost of all calls", f"{report.cost:,.10g}"))
        if report.stopped:
            rows.append(("Stopped buying", cell(report.stopped)))
        rows.append(("Output", code(report.output)))
        parts = [self._head("Summary"), table(("", ""), rows)]
        if standing.slowest:
            slow = [(code(key), duration(seconds)) for seconds, key in standing.slowest]
            parts += ["### Slowest rows", table(("Row", "Time"), slow)]
        return "\n\n".join(parts) + "\n"
