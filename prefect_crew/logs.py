"""Where this package logs: the run's own log inside flows and tasks, else the logger `prefect_crew`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from prefect_crew.api._error import one_line

__all__ = ["OneLine", "run_logger"]

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger | logging.LoggerAdapter[Any]]
else:
    Adapter = logging.LoggerAdapter


class OneLine(Adapter):
    """A logger whose every message is one line: a crew's words make no line of their own, and steer no terminal."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message."""
        if self.isEnabledFor(level):
            kwargs.setdefault("stacklevel", 2)
            self.logger.log(level, "%s", one_line(str(msg) % args if args else str(msg)), **kwargs)


def run_logger() -> OneLine:
    """Return the logger of the current task or flow run, else the package's."""
    try:
        return OneLine(get_run_logger(), {})
    except MissingContextError:
        return OneLine(logging.getLogger("prefect_crew"), {})
