"""The Prefect API for a command: reachable and quiet."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from prefect_crew.cli import _output
from prefect_crew.exceptions import PrefectAwayError

START_WITHIN = 120
"""Seconds for the embedded server: it makes its database the first time, and machines are slow."""
CHECK_URL = (
    "Start that server with `prefect server start`, or check PREFECT_API_URL, which has to end in /api, such as "
    "http://127.0.0.1:4200/api."
)
ANSWER_WITHIN = 10.0
"""Seconds for the first answer of the server in PREFECT_API_URL."""


def reach_prefect(*, lasting: bool = False) -> str | None:
    """Import Prefect and make sure that its API answers; return its URL, None for Prefect's embedded server.

    From then on, this terminal shows no logs of Prefect's own.

    Args:
        lasting: Whether the server has to outlast this command, unlike the embedded server.

    Raises:
        PrefectAwayError: The API does not answer, or no URL is set and the embedded server will not do.
        PrefectAwayError: The API refuses the key.
    """
    importlib.import_module("prefect.main")  # which sets up the logging
    from prefect.logging.handlers import PrefectConsoleHandler
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = settings.api.url
    for handler in (*logging.getLogger().handlers, *logging.getLogger("prefect").handlers):
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_show_own_logs)  # once, however often it is called
    if url:
        _check()
    elif lasting or not settings.server.ephemeral.enabled:
        why = "the settings of Prefect forbid its embedded server"
        if lasting:
            why = "this needs a Prefect server that stays"
        raise PrefectAwayError(
            f"PREFECT_API_URL is not set, and {why}. Start a Prefect server with `prefect server start`, then set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    else:
        _start_embedded()
    return url


def _check() -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from prefect_crew._internal.prefect_errors import STATUS_ERRORS, prefect_error

    def judge(response: httpx.Response) -> None:
        # The client would wait before it gives up, and takes a page of another server for an answer.
        if response.is_error or "html" in response.headers.get("Content-Type", ""):
            raise PrefectHTTPStatusError("no answer of the API", request=response.request, response=response)

    timeout = httpx.Timeout(ANSWER_WITHIN, connect=ANSWER_WITHIN / 4)  # the client tries to connect four times
    asking = {"timeout": timeout, "event_hooks": {"response": [judge]}}
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(asking, sync_client=True) as client:
        problem = client.api_healthcheck()
    is_busy = isinstance(problem, STATUS_ERRORS) and problem.response.status_code == 429  # so it is there
    if problem is not None and not is_busy:
        raise prefect_error(problem, CHECK_URL) from None


def _start_embedded() -> None:
    """Let Prefect's client start the embedded server, which ends with this process."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings

    if not _output.current.debug:  # what it logs, such as a busy database, is kept off this terminal
        for name in ("PREFECT_SERVER_LOGGING_LEVEL", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
            os.environ.setdefault(name, "CRITICAL")
    _output.note("Starting Prefect's embedded server (10 to 20 seconds the first time) …")
    outcome = Future[None]()

    def start() -> None:
        # The keys send SIGINT to every process of the terminal, so the server would end before the end of the flow run
        # is on record. A process inherits the signal mask of the thread that starts it.
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: START_WITHIN}):
                get_client(sync_client=True)
        except Exception as error:  # noqa: BLE001 - the thread that waits raises it
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=start, daemon=True).start()
    try:
        outcome.result(START_WITHIN + 10)  # Prefect starts a server whose database is broken again and again
    except (RuntimeError, TimeoutError) as error:
        why = str(error).rstrip(".") or "it gave no answer"
        raise PrefectAwayError(
            f"Prefect's embedded server did not start: {why}. Try `prefect server start`, which shows more."
        ) from None


_PACKAGE = str(Path(__file__).parent.parent)


def _show_own_logs(record: logging.LogRecord) -> bool:
    """Write the warnings of this package as notes, and keep all other logs off this terminal; a filter of handlers.

    The command itself reports a failed flow. Prefect's pages have all logs, and so has the terminal with --debug.
    """
    if _output.current.debug:
        return True
    # Whether a crew that was to be stopped has stopped is said at any level.
    matters = record.levelno >= (logging.INFO if record.module == "stop" else logging.WARNING)
    if matters and record.pathname.startswith(_PACKAGE):
        _output.note(record.getMessage())
    return False


def page_url(its_id: str | None, kind: Literal["flow-run", "deployment"] = "flow-run") -> str | None:
    """Return the URL of the page of a flow run or a deployment; None for the embedded server, which has no pages."""
    if its_id is None or "prefect" not in sys.modules:
        return None
    from prefect.settings import get_current_settings
    from prefect.utilities.urls import url_for

    return url_for(kind, obj_id=its_id) if get_current_settings().ui_url else None
