"""The report of a batch, also while it runs: for code, as a line for people, and on its page in Prefect."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from prefect_crew._internal.prefect_api import flow_run_id
from prefect_crew._text import by_reason
from prefect_crew.artifacts.escape import cell, code, commands, duration, fenced, flow_run_link, link, prose, table
from prefect_crew.artifacts.run import MarkdownArtifact, artifact_key
from prefect_crew.batches.rows import BadRow, BadRows
from prefect_crew.client.models import TokenUsage
from prefect_crew.crew import Crew
from prefect_crew.exceptions import BatchFailedError
from prefect_crew.prices import Spending, money
from prefect_crew.runs.keys import escape_name
from prefect_crew.store.batches import CONFLICT, BatchUse, Counts
from prefect_crew.store.decision import PREPARING, AttemptState

FAILURES = 100
"""Failed rows that the artifact shows at most; the output has all."""
UNCERTAIN_KEYS = 1_000
FAILED = (AttemptState.FAILED, AttemptState.STOPPED, AttemptState.LOST)
"""The states of rows that have ended without a result."""
SHOW_EVERY = 5.0
"""Seconds, at least, between two updates of the artifact."""
BAR = 24
Phase = Literal["checking", "running", "finishing", "done"]


@dataclass(frozen=True, slots=True)
class RowEnd:
    """The end of a row in one call, with the class and the text of its error.

    `state`: that of its run, or "uncertain", "conflict", "invalid-output" (a result that does not fit `output_type`),
    "not-started" (its kickoff was refused) or "unfinished" (the wait for its run gave up). `is_new`: this call brought
    it about.
    """

    key: str
    state: str
    kind: str | None = None
    error: str | None = None
    kickoff_id: str | None = None
    is_new: bool = True

    @property
    def is_unfinished(self) -> bool:
        """Whether the next call goes on with the row by itself, although the run may be fine or nothing was started."""
        return self.state in ("unfinished", "not-started")


@dataclass
class Tally:
    """What one call has seen of its rows, and the crew database does not count: rows that have completed but count as
    failed (`misfits`), and rows that failed only here (`unfinished`)."""

    began: float = field(default_factory=time.monotonic)
    ended: int = 0
    misfits: int = 0
    unfinished: int = 0
    failures: list[RowEnd] = field(default_factory=list[RowEnd])
    uncertain_keys: list[str] = field(default_factory=list[str])
    errors: Counter[str] = field(default_factory=Counter[str])

    def add(self, end: RowEnd) -> None:
        """Count a row that has ended in this call, or was found to have."""
        self.ended += end.is_new
        self.errors.update([end.kind] if end.kind else [])
        self.misfits += end.state == "invalid-output"
        self.unfinished += end.is_unfinished
        if end.state == "uncertain":
            if len(self.uncertain_keys) < UNCERTAIN_KEYS:
                self.uncertain_keys.append(end.key)
        elif end.state != "completed" and len(self.failures) < FAILURES:
            self.failures.append(end)


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """A batch, with all earlier calls of the same name: at its end, or while it runs.

    Attributes:
        name: The batch.
        total: All rows, bad ones too.
        completed, failed, uncertain: Rows in these states. A person has to resolve the uncertain ones.
        conflicts: The failed rows that have completed before with other inputs.
        unfinished: The failed rows that the next call continues: the wait for their runs gave up, or the crew's server
            refused their kickoffs.
        in_flight: Runs in flight. `people`: how many of them wait for a person.
        seconds: The wall time of this call.
        export: The address of the lines.
        stopped: The reason why the batch stopped, None if it did not stop.
        kickoffs: Runs that this call started.
        bad_count: Bad rows, which cannot be run. `bad`: the first of them.
        uncertain_keys: The keys of the uncertain rows, up to 1,000.
        errors: Failures of this call by the class of their error.
        spending: Usage and cost of the runs of all calls, and the number of runs that reported usage and cost.
        phase: What the call does.
        ended_here: Rows that ended in this call.
    """

    name: str
    total: int
    completed: int = 0
    failed: int = 0
    uncertain: int = 0
    seconds: float = 0.0
    export: str = ""
    stopped: str | None = None
    kickoffs: int = 0
    bad_count: int = 0
    bad: Sequence[BadRow] = ()
    uncertain_keys: Sequence[str] = ()
    errors: Mapping[str, int] = field(default_factory=dict[str, int])
    conflicts: int = 0
    unfinished: int = 0
    in_flight: int = 0
    people: int = 0
    ended_here: int = 0
    phase: Phase = "done"
    spending: Spending = field(default_factory=Spending)

    @classmethod
    def of(
        cls, counts: Counts, tally: Tally, bad: BadRows, use: BatchUse | None, *, phase: Phase, **more: Any
    ) -> BatchReport:
        """Return the report of a batch by the states of its rows, what a call has seen, and the use of all runs."""
        # Once the batch has ended, only a process that died left them: nobody knows whether they started.
        preparing = sum(counts.get(state, 0) for state in PREPARING)
        conflicts = counts.get(CONFLICT, 0)
        failed = sum(counts.get(state, 0) for state in FAILED) + conflicts + tally.misfits + tally.unfinished
        spending = Spending()
        if use is not None:
            usage = TokenUsage(total_tokens=use.tokens) if use.runs_with_tokens else None
            cost = use.cost if use.runs_with_cost else None
            spending = Spending(use.runs, use.runs_with_tokens, use.runs_with_cost, usage, cost)
        return cls(
            completed=max(0, counts.get(AttemptState.COMPLETED, 0) - tally.misfits),
            failed=failed,
            uncertain=counts.get(AttemptState.UNCERTAIN, 0) + (preparing if phase == "done" else 0),
            in_flight=counts.get(AttemptState.STARTED, 0) + (0 if phase == "done" else preparing),
            conflicts=conflicts,
            unfinished=tally.unfinished,
            seconds=time.monotonic() - tally.began,
            ended_here=tally.ended,
            bad_count=bad.count,
            bad=tuple(bad.rows),
            uncertain_keys=tuple(tally.uncertain_keys),
            errors=dict(tally.errors),
            spending=spending,
            phase=phase,
            **more,
        )

    @property
    def skipped(self) -> int:
        """Rows that were not run: bad rows, rows left in flight, and rows not reached because the batch stopped."""
        return max(0, self.total - self.done)

    @property
    def done(self) -> int:
        """Rows that have ended or are uncertain."""
        return self.completed + self.failed + self.uncertain

    @property
    def rate(self) -> float:
        """Rows that end per second, in this call."""
        return self.ended_here / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """The seconds for the remaining rows at this rate; None if no row remains, or no row has ended."""
        remaining = self.skipped - self.bad_count
        return remaining / self.rate if self.rate > 0 and remaining > 0 else None

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens that runs reported, None if no run did."""
        return self.spending.usage

    @property
    def cost(self) -> float | None:
        """The sum of the known costs, None if no cost is known."""
        return self.spending.cost

    @property
    def ok(self) -> bool:
        """Whether every row has completed."""
        return self.completed == self.total

    def raise_for_failures(self) -> None:
        """Raise BatchFailedError unless every row has completed."""
        if not self.ok:
            advice = (
                "The same call goes on with the rows that are left, and starts failed ones again, up to max_attempts."
            )
            raise BatchFailedError(f"{str(self).rstrip('.')}. {advice}", report=self)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**to_jsonable_python(asdict(self)), "skipped": self.skipped, "spending": self.spending.as_dict()}

    def __str__(self) -> str:
        parts = [f"{self.completed:,} of {self.total:,} rows completed"]
        rest = (
            ("failed", self.failed),
            ("uncertain", self.uncertain),
            ("not run", self.skipped - self.bad_count),
            ("bad", self.bad_count),
        )
        parts += [f"{count:,} {word}" for word, count in rest if count]
        text = f"Batch {self.name}: {', '.join(parts)} in {duration(self.seconds)}. Export: {self.export}"
        if self.usage is not None or self.cost is not None:
            text += f". Used: {self.spending}"
        return f"{text}. It stopped: {self.stopped}" if self.stopped else text


OnProgress = Callable[[BatchReport], None]
"""Called when a batch enters another phase, and about once a second. It must be quick and must not raise."""


@dataclass(frozen=True)
class BatchPlan:
    """The plan of a batch. Nothing was started.

    Attributes:
        name: The batch.
        rows: The number of rows that can be run. `done`: how many of them have ended in earlier calls.
        bad: Rows that cannot be run, up to 1,000. `bad_count`: the number of all of them.
        max_in_flight: The number of runs at once.
        seconds, price: The time and the cost to expect; None if they are not known.
    """

    name: str
    rows: int
    done: int
    bad: Sequence[BadRow]
    bad_count: int
    max_in_flight: int
    seconds: float | None
    price: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return to_jsonable_python(asdict(self))

    def __str__(self) -> str:
        remaining = self.rows - self.done
        done = f"{self.done:,} done, {remaining:,} to run" if self.done else f"{remaining:,} to run"
        lines = [f"Batch {self.name}: {self.rows:,} rows, {done}, {self.max_in_flight:,} at a time."]
        listed, more = by_reason(self.bad, self.bad_count)
        lines += [f"{where[:1].upper()}{where[1:]} cannot be run: {reason}." for where, reason in listed]
        if more:
            lines.append(f"And {more:,} more rows that cannot be run.")
        if self.seconds is not None:
            lines.append(f"It takes about {duration(self.seconds)}.")
        if self.price is not None:
            lines.append(f"It costs about {money(self.price)}.")
        return "\n".join(lines)


class BatchArtifact:
    """The page of one batch: its progress, its failures, and at the end its figures."""

    def __init__(self, name: str, crew: Crew) -> None:
        self._name = name
        self._crew = crew
        self._artifact = MarkdownArtifact(
            artifact_key(name, prefix="batch"), f"Batch {name}", flow_run_id=flow_run_id()
        )
        self._shown_at = 0.0

    async def update(self, report: BatchReport, failures: Sequence[RowEnd]) -> None:
        """Show a report: every few seconds at most, and at the end."""
        if report.phase != "done" and time.monotonic() - self._shown_at < SHOW_EVERY:
            return
        self._shown_at = time.monotonic()
        problems = {"failed": report.failed, "uncertain": report.uncertain, "bad": report.bad_count}
        counts = ", ".join(f"{count:,} {word}" for word, count in problems.items() if count)
        parts = [f"## Batch {prose(self._name)} · {prose(self._crew.label)}{f': {counts}' if counts else ''}"]
        if report.stopped:
            parts += ["### Stopped", fenced(report.stopped)]
        parts += [table(("", ""), self._figures(report)), *self._needs_person(report, failures)]
        await self._artifact.keep("\n\n".join(parts) + "\n")

    def _needs_person(self, report: BatchReport, failures: Sequence[RowEnd]) -> list[str]:
        parts: list[str] = []
        if report.uncertain_keys:
            text = ", ".join(code(key) for key in report.uncertain_keys[:FAILURES])
            command = f"prefect-crew runs resolve {shlex.quote(f'batch/{escape_name(self._name)}/KEY')}"
            parts += [
                "### Uncertain",
                f"Nobody knows whether {report.uncertain:,} kickoffs started a run. Look at the crew's page, then "
                f"resolve each: {text}",
                commands(f"{command} --kickoff-id ID", f"{command} --never-started"),
            ]
        if failures:
            is_shown, name = self._crew.show != "none", shlex.quote(self._name)
            rows = [
                (
                    code(failure.key),
                    code(failure.kickoff_id) if failure.kickoff_id else "–",
                    cell(failure.state),
                    cell((failure.error or "–") if is_shown else "not shown"),
                )
                for failure in failures
            ]
            again = "The same call starts failed ones again, up to max_attempts of the crew. To list all:"
            parts += ["### Failed", f"The first {len(rows):,} of {report.failed:,}. {again}"]
            parts.append(commands(f"prefect-crew batch failures {name}"))
            parts.append(table(("Row", "Run", "State", "Error"), rows))
        if report.bad_count:
            lines = [(f"{row.line:,}", cell(row.reason)) for row in report.bad[:FAILURES]]
            text = f"The first {len(lines):,} of {report.bad_count:,} rows that cannot be run."
            parts += ["### Bad rows", text, table(("Line", "Why"), lines)]
        return parts

    def _figures(self, report: BatchReport) -> list[tuple[str, str]]:
        share = report.done / report.total if report.total else 1.0
        full = round(share * BAR)
        bar = f"{'█' * full}{'░' * (BAR - full)} {report.done:,} of {report.total:,} ({share:.1%})"
        counts = {"Completed": report.completed, "Failed": report.failed, "Uncertain": report.uncertain}
        if report.bad_count:
            counts["Bad"] = report.bad_count
        rows = [("Done", bar), *((name, f"{count:,}") for name, count in counts.items())]
        if (run := flow_run_id()) is not None:
            rows.append(("Flow run", flow_run_link(run)))
        if self._crew.page_url:
            rows.append(("Crew", link(self._crew.label, self._crew.page_url)))
        if report.people:
            rows.append(("Wait for a person", f"{report.people:,} · `prefect-crew reviews ls`"))
        if report.phase != "done":
            return [
                *rows,
                ("In flight", f"{report.in_flight:,}"),
                ("Rate", f"{report.rate:.1f} rows/s"),
                ("Time so far", duration(report.seconds)),
                ("Time left", "–" if report.seconds_left is None else duration(report.seconds_left)),
            ]
        rows += [
            ("Not run", f"{report.skipped - report.bad_count:,}"),
            ("Kickoffs of this call", f"{report.kickoffs:,}"),
            ("Time of this call", duration(report.seconds)),
        ]
        rows += [(name.replace("_", " "), f"{count:,}") for name, count in report.usage or () if count is not None]
        if report.cost is not None:
            rows.append(("Cost of all calls", money(report.cost)))
        if (report.usage is not None or report.cost is not None) and report.spending.unknown:
            rows.append(("Unknown", report.spending.unknown))
        return [*rows, ("Export", code(report.export))]
