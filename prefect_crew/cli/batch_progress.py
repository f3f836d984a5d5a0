"""What a person sees of a batch under way: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from prefect_crew.cli import terminal
from prefect_crew.cli.progress import LiveProgress, PlainProgress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from prefect_crew.batches.standing import Standing

__all__ = ["BatchProgress", "LiveBatch", "PlainBatch", "batch_progress", "figures"]

SAY_EVERY = 10.0
"""Seconds between two plain lines."""
BAR = 30


def figures(standing: Standing) -> str:
    """Return how a batch stands, as the words behind its bar."""
    from prefect_crew.rendering import duration

    left = standing.seconds_left
    parts = (
        f"{standing.failed:,} failed" if standing.failed else "",
        f"{standing.uncertain:,} uncertain" if standing.uncertain else "",
        f"{standing.in_flight:,} in flight" if standing.in_flight else "",
        f"{standing.people:,} wait for a person" if standing.people else "",
        f"{standing.rate:.1f} rows/s" if standing.ended_here else "",
        f"{duration(left)} left" if left and standing.done < standing.total else "",
    )
    return " · ".join(part for part in parts if part)


class PlainBatch(PlainProgress):
    """A line when something else begins, and every few seconds how it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_run_id: str | None = None
        self._said_at = 0.0

    def __enter__(self) -> PlainBatch:
        return self

    def watch_batch(self, name: str, phase: str, standing: Standing | None) -> None:
        """Take in what `watch_batches` tells."""
        self.flow_run_id = self.flow_run_id or _flow_run_id()
        if phase == "checking":
            self.phase(f"Batch {name}: checking every row")
        elif phase == "running" and standing is not None:
            now = time.monotonic()
            if now - self._said_at >= SAY_EVERY:
                self._said_at = now
                self.note(f"Batch {name}: {_count(standing)}{_behind(figures(standing))}")
        elif phase == "finishing" and standing is not None:
            self.note(f"Batch {name}: {_count(standing)}, writing the output")


class LiveBatch(LiveProgress):
    """A bar that is redrawn, with what was said before above it."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_run_id: str | None = None
        self._name = ""
        self._standing: Standing | None = None
        self._over = False

    def __enter__(self) -> LiveBatch:
        return self

    def watch_batch(self, name: str, phase: str, standing: Standing | None) -> None:
        """Take in what `watch_batches` tells."""
        self.flow_run_id = self.flow_run_id or _flow_run_id()
        self._name, self._over = name, phase == "done"
        if standing is None:
            self.phase(f"Batch {name}: checking every row")
        else:
            self._standing, self._phase = standing, None
            self._start()

    def close(self) -> None:
        """Leave the last drawing of the bar on the screen, and nothing of a phase."""
        live = self._live
        super().close()
        if live is not None and self._standing is not None and self._phase is None:
            terminal.errors().print(self._bar(self._standing))

    def _draw(self) -> RenderableType:
        if self._standing is None or self._phase is not None:
            return super()._draw()
        return self._bar(self._standing)

    def _bar(self, standing: Standing) -> RenderableType:
        from rich.markup import escape
        from rich.text import Text

        share = standing.done / standing.total if standing.total else 1.0
        full = int(share * BAR)
        bar = f"[green]{'━' * full}[/][dim]{'━' * (BAR - full)}[/]"
        name = escape(terminal.redact(terminal.plain(self._name)))
        behind = _behind(figures(standing))
        shown = f"[bold]{name}[/] {bar} {standing.done:,} of {standing.total:,}[dim]{behind}[/]"
        if not self._over:
            return self._spun(shown)
        good = standing.completed == standing.total
        return Text.from_markup(f"{'[green]✓[/]' if good else '[red]✗[/]'} {shown}")


BatchProgress = PlainBatch | LiveBatch


def batch_progress() -> BatchProgress:
    """Return the progress for this terminal, file or pipe."""
    return LiveBatch() if terminal.is_terminal(sys.stderr) else PlainBatch()


def _count(standing: Standing) -> str:
    return f"{standing.done:,} of {standing.total:,} rows"


def _behind(text: str) -> str:
    return f" · {text}" if text else ""


def _flow_run_id() -> str | None:
    from prefect_crew.stopping import flow_run_id

    return flow_run_id()
