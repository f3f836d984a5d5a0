"""`prefect-crew webhooks`: the receiver of webhooks."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

from cyclopts import Parameter

from prefect_crew.cli import terminal
from prefect_crew.cli.crews import PORT

__all__ = ["webhooks"]

MIB = 1024 * 1024


def webhooks(
    *,
    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, PORT] = 8001,
    max_body: Annotated[float, Parameter(help="MiB of a webhook's body; the crew's whole result is in one.")] = 1.0,
    queue: Annotated[int, Parameter(help="How many webhooks wait while the Prefect API is away.")] = 2000,
) -> int:
    """Take the webhooks of crews and turn them into Prefect events, until Ctrl-C.

    It verifies with PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET what kickoffs have signed with the same.
    """
    from prefect_crew.api.errors import ConfigurationError
    from prefect_crew.receiver.app import create_receiver
    from prefect_crew.receiver.handover import Handover
    from prefect_crew.receiver.serving import serve_receiver

    if not (0.001 <= max_body <= 1024 and queue >= 1):
        raise ConfigurationError("--max-body is 0.001 to 1024 MiB, and --queue 1 or more.")
    _log_to_stderr(logging.DEBUG if terminal.debugging() else logging.INFO)
    app = create_receiver(max_body=int(max_body * MIB), hand_on=Handover(limit=queue))
    try:
        return serve_receiver(app, host=host, port=port, announce=_announce)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Try --port 0.") from error


def _log_to_stderr(level: int) -> None:
    """Have the receiver's own log lines on standard error, whatever Prefect's logging is set to."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("prefect_crew.receiver")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _announce(line: str) -> None:
    terminal.put(line)
    sys.stdout.flush()  # whoever started this as a process reads the line through a pipe
