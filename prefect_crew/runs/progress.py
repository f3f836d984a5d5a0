"""Whoever wants to see the runs of this process as they go on, without asking the crew's server once more.

The command line's progress is drawn from it. What is told is what was seen anyway: nothing is asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.runs.run import OpenRun


Watch = Callable[["OpenRun", "CrewStatus | None"], None]
"""Called with a run and its status; None once, when the run has been kicked off or found."""

# Process-wide: a context variable would not reach the threads of a sync flow's task runner.
_watches: list[Watch] = []


@contextmanager
def watch_runs(watch: Watch) -> Generator[None]:
    """Call `watch` for every run that this process opens or waits for meanwhile, from whichever thread waits for it.

    It must be quick and must not raise: it is called on the event loop that waits.
    """
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def tell(run: OpenRun, status: CrewStatus | None) -> None:
    """Tell everyone who watches."""
    for watch in tuple(_watches):
        watch(run, status)
