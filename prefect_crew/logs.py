"""Where this package logs: the run's own log inside flows and tasks, else the logger `prefect_crew`."""

from __future__ import annotations

import logging

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

__all__ = ["run_logger"]


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the current task or flow run, else the package's."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("prefect_crew")
