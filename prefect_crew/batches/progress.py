"""How a batch stands: counts, rate, and the artifact that shows them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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
RECENT = 60.0
"""Seconds over which the rate is taken."""
SHOW_EVERY = 5.0
"""Seconds, at least, between two updates of the artifact."""
BAR = 24


class Failure(NamedTuple):
    """A row that failed, for people. `kind` is the class of its error."""

    key: str
    kickoff_id: str | None
    state: str
    error: str
    kind: str | None


@dataclass
class BatchProgress:
    """How a batch stands, all of its calls so far included.

    Attributes:
        name: The batch.
        phase: What is done now.
        total: Rows that can be run; 0 while they are checked. `set_aside`: those that cannot; `duplicates`: how many
            equal an earlier one.
        completed, failed, uncertain: Rows that have ended so.
        in_flight: Runs that are waited for. `people`: those of them that wait for a person.
        ended_here: Rows that ended in this call.
        failures, uncertain_keys: The first ones.
        errors: Failures of this call by the class of their error.
    """

    name: str
    phase: Literal["checking", "running", "finishing", "done"] = "checking"
    total: int = 0
    set_aside: SetAside = field(default_factory=SetAside)
    duplicates: int = 0
    completed: int = 0
    failed: int = 0
    uncertain: int = 0
    in_flight: int = 0
    people: int = 0
    ended_here: int = 0
    started: float = field(default_factory=time.monotonic)
    failures: list[Failure] = field(default_factory=list[Failure])
    uncertain_keys: list[str] = field(default_factory=list[str])
    errors: Counter[str] = field(default_factory=Counter[str])
    _not_final: int = 0
    _usage: Counter[str] = field(default_factory=Counter[str])
    _ticks: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

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
        return self.completed + self.failed == self.total and not self._not_final

    @property
    def seconds(self) -> float:
        """How long this call has taken."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows that end a second, over the last minute."""
        at, ended = self._ticks[0] if self._ticks else (self.started, 0)
        return (self.ended_here - ended) / max(time.monotonic() - at, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate; None where there is no rest, or nothing tells."""
        rate, left = self.rate, self.total - self.done
        return left / rate if rate > 0 and left > 0 else None

    @property
    def usage(self) -> TokenUsage | None:
        """The sum of what the server reported, None where it reported nothing."""
        return TokenUsage(**self._usage) if self._usage else None

    def tick(self) -> None:
        """Remember how many rows had ended now, for the rate."""
        now = time.monotonic()
        self._ticks.append((now, self.ended_here))
        while len(self._ticks) > 2 and now - self._ticks[1][0] > RECENT:
            self._ticks.popleft()

    def add(self, end: RowEnd) -> None:
        """Count a row that has ended."""
        self.ended_here += not end.found
        if end.uncertain:
            self.uncertain += 1
            if len(self.uncertain_keys) < UNCERTAIN_KEYS:
                self.uncertain_keys.append(end.job.key)
            return
        self.completed += end.completed
        record = end.record
        if not end.completed:
            self.failed += 1
            self._not_final += end.state not in FINAL
            if end.kind is not None and not end.found:
                self.errors[end.kind] += 1
            if len(self.failures) < FAILURES:
                run = None if record is None else record.kickoff_id
                self.failures.append(Failure(end.job.key, run, end.state, end.error or end.state, end.kind))
        if record is not None and record.result is not None and record.result.usage is not None:
            self.add_usage({name: count for name, count in record.result.usage if count is not None})

    def add_usage(self, reported: Mapping[str, int]) -> None:
        """Add what runs have used."""
        self._usage.update(reported)


OnProgress = Callable[[BatchProgress], None]
"""Called when a batch begins something else, and about once a second. It must be quick and must not raise."""


class BatchArtifact:
    """The page of one batch: progress, what failed, and in the end its figures.

    Args:
        name: The batch.
        crew: What its crew is called.
        show: How much may be shown of what crews say; with "none", no error text.
    """

    def __init__(self, name: str, crew: str, *, show: str) -> None:
        self._head = f"## Batch {prose(name)} · {prose(crew)}"
        self._name = name
        self._show = show
        self._artifact = MarkdownArtifact(
            artifact_key(name, prefix="batch"), f"Batch {name}", flow_run_id=flow_run_id()
        )
        self._shown_at = 0.0
        self._failed = False

    async def update(self, progress: BatchProgress, report: BatchReport | None = None) -> None:
        """Show how the batch stands: every few seconds at most, and at its end with its report."""
        if report is None and time.monotonic() - self._shown_at < SHOW_EVERY:
            return
        self._shown_at = time.monotonic()
        parts = [self._head, _figures(progress, report), *self._failures(progress)]
        error = await self._artifact.put("\n\n".join(parts) + "\n")
        if error and not self._failed:
            self._failed = True
            run_logger().warning("The artifact of batch %s could not be updated: %s", self._name, error)

    def _failures(self, progress: BatchProgress) -> list[str]:
        parts: list[str] = []
        if progress.uncertain_keys:
            shown = ", ".join(code(key) for key in progress.uncertain_keys[:FAILURES])
            parts += ["### Uncertain", f"To be resolved by a person ({progress.uncertain:,}): {shown}"]
        if progress.failures:
            rows = [
                (
                    code(one.key),
                    code(one.kickoff_id) if one.kickoff_id else "–",
                    cell(one.state),
                    cell(one.error if self._show != "none" else one.kind or "–"),
                )
                for one in progress.failures
            ]
            parts += ["### Failed", f"The first {len(rows):,} of {progress.failed:,}:"]
            parts.append(table(("Row", "Run", "State", "Error"), rows))
        if (aside := progress.set_aside).count:
            bad = [(f"{row.line:,}", cell(row.reason)) for row in aside.rows[:FAILURES]]
            shown, where = f"{len(bad):,} of {aside.count:,} rows that cannot be run", code(aside.output or "")
            parts += ["### Set aside", f"The first {shown}. All are in {where}.", table(("Line", "Why"), bad)]
        return parts


def _figures(progress: BatchProgress, report: BatchReport | None) -> str:
    share = progress.done / progress.whole if progress.whole else 1.0
    full = round(share * BAR)
    rows = [
        ("Done", f"{'█' * full}{'░' * (BAR - full)} {progress.done:,} of {progress.whole:,} ({share:.1%})"),
        ("Completed", f"{progress.completed:,}"),
        ("Failed", f"{progress.failed:,}"),
        ("Uncertain", f"{progress.uncertain:,}"),
    ]
    if progress.set_aside.count:
        rows.append(("Set aside", f"{progress.set_aside.count:,}"))
    if progress.people:
        rows.append(("Wait for a person", f"{progress.people:,} · `prefect-crew reviews`"))
    if report is None:
        left = progress.seconds_left
        rows += [
            ("In flight", f"{progress.in_flight:,}"),
            ("Rate", f"{progress.rate:.1f} rows/s"),
            ("Time so far", duration(progress.seconds)),
            ("Time left", "–" if left is None else duration(left)),
        ]
        return table(("", ""), rows)
    rows += [
        ("Not run", f"{report.skipped - report.set_aside:,}"),
        ("Kickoffs of this call", f"{report.kickoffs:,}"),
        ("Time of this call", duration(report.seconds)),
    ]
    if report.usage is not None:
        rows += [(name.replace("_", " "), f"{count:,}") for name, count in report.usage if count is not None]
    if report.cost is not None:
        rows.append(("Cost of all calls", f"{report.cost:,.10g}"))
    if report.stopped:
        rows.append(("Stopped", cell(report.stopped)))
    return table(("", ""), [*rows, ("Output", code(report.output))])
