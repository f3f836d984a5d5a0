"""What people look at: three artifacts a batch, whatever its rows are many. They never fail it."""

from __future__ import annotations

import statistics
import time

from prefect_crew.artifacts import MarkdownArtifact, artifact_key
from prefect_crew.batches.report import BatchReport
from prefect_crew.batches.standing import FAILURES, Standing
from prefect_crew.logs import run_logger
from prefect_crew.rendering import cell, code, duration, prose, table
from prefect_crew.stopping import flow_run_id

__all__ = ["BatchArtifacts"]

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
            parts.append(f"**Uncertain**, to be settled by a person ({standing.uncertain:,}): {shown}")
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
