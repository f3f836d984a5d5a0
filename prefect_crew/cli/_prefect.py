"""The Prefect API for a command: reachable and quiet. A server that was started for the command ends with it."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

from prefect_crew.cli import _output
from prefect_crew.cli._output import Progress
from prefect_crew.exceptions import PrefectAwayError, PrefectRefusedError

START_WITHIN = 120
"""Seconds for the embedded server: it makes its database the first time, and machines are slow."""
ANSWER_WITHIN = 10.0
"""Seconds for the first answer of the server in PREFECT_API_URL."""


def reach_prefect(*, lasting: bool = False) -> str | None:
    """Import Prefect and make sure that its API answers; return its URL, None for Prefect's embedded server.

    From then on, this terminal shows no logs of Prefect's own.

    Args:
        lasting: Whether the server has to outlast this command, unlike the embedded server.

    Raises:
        PrefectAwayError: The API does not answer, or no URL is set and the embedded server will not do.
        PrefectRefusedError: The API refuses the key.
    """
    with Progress(quiet=True) as progress:
        progress.phase("Loading Prefect")
        importlib.import_module("prefect.main")  # which sets up the logging
        from prefect.logging.handlers import PrefectConsoleHandler
        from prefect.settings import get_current_settings

        settings = get_current_settings()
        url = settings.api.url
        for handler in (*logging.getLogger().handlers, *logging.getLogger("prefect").handlers):
            if isinstance(handler, PrefectConsoleHandler):
                handler.addFilter(_show_own_logs)  # once, however often it is called
        if url:
            from prefect_crew._internal.prefect_errors import shown_url

            progress.phase(f"Asking the Prefect API at {shown_url(url)}")
            _check(url)
        elif lasting or not settings.server.ephemeral.enabled:
            why = "the settings of Prefect forbid its embedded server"
            if lasting:
                why = "this needs a Prefect server that stays"
            raise PrefectAwayError(
                f"PREFECT_API_URL is not set, and {why}. Start a Prefect server with `prefect server start`, then set "
                "PREFECT_API_URL=http://127.0.0.1:4200/api."
            )
        else:
            progress.phase("Starting Prefect's embedded server", "10 to 20 seconds the first time")
            _start_embedded()
    return url


def _check(url: str) -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from prefect_crew._internal.prefect_errors import STATUS_ERRORS, shown_url

    def judge(response: httpx.Response) -> None:
        # Raised here, since the client would wait before it gives up, and takes a page of another server for an answer.
        is_page = response.is_success and "html" in response.headers.get("Content-Type", "")
        if is_page or response.is_error:
            problem = f"GET {response.url.path} was answered with {'a page' if is_page else response.status_code}"
            raise PrefectHTTPStatusError(problem, request=response.request, response=response)

    timeout = httpx.Timeout(ANSWER_WITHIN, connect=ANSWER_WITHIN / 4)  # the client tries to connect four times
    asking = {"timeout": timeout, "event_hooks": {"response": [judge]}}
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(asking, sync_client=True) as client:
        problem = client.api_healthcheck()
    code = problem.response.status_code if isinstance(problem, STATUS_ERRORS) else None
    if problem is None or code == 429:  # which says that it is there
        return
    why = str(problem).rstrip(".") or type(problem).__name__
    fix = (
        "Start that server, or set PREFECT_API_URL to one that runs; without PREFECT_API_URL Prefect starts an "
        "embedded one."
    )
    if code in (401, 403):
        fix = "Check PREFECT_API_KEY or PREFECT_API_AUTH_STRING."
    elif code is not None and code < 500:
        fix = "Check PREFECT_API_URL, which has to end in /api, such as http://127.0.0.1:4200/api."
    how = "" if code is None else " as it should"
    kind = PrefectRefusedError if code in (401, 403) else PrefectAwayError
    raise kind(f"The Prefect API at {shown_url(url)} does not answer{how}: {why}. {fix}") from None


def _start_embedded() -> None:
    """Start Prefect's embedded server, which ends with the command.

    Prefect's own class (`SubprocessASGIServer`) starts a server with a broken database again and again.
    """
    from prefect_crew._internal.prefect_api import embedded_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if not _output.current.debug:  # what it logs, such as a busy database, is kept off this terminal
        for name in ("PREFECT_SERVER_LOGGING_LEVEL", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
            os.environ.setdefault(name, "CRITICAL")
    at_end, url = _output.current.at_end, f"http://127.0.0.1:{port}/api"
    command, env = embedded_server(port)

    def start() -> subprocess.Popen[bytes]:
        # The keys send SIGINT to every process of the terminal, so the server would end before the end of the flow run
        # is on record. A process inherits the signal mask of the thread that starts it.
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process = subprocess.Popen(command, env=env)  # noqa: S603 - fixed words, and a port
        at_end.callback(_end, process)
        return process

    at_end.callback(_use_server, None)  # once it has ended
    with ThreadPoolExecutor(1) as pool:  # which is waited for when this thread is interrupted, so that its end is sure
        process = pool.submit(start).result()
    _use_server(url)
    importlib.import_module("prefect_crew.flows")  # most commands need it, and the server takes longer
    _wait_for(process, f"{url}/health")


def _use_server(url: str | None) -> None:
    from prefect.context import refresh_global_settings_context

    for name, value in {"PREFECT_API_URL": url, "PREFECT_UI_URL": url and ""}.items():  # it has no pages
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    refresh_global_settings_context()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    import httpx

    from prefect_crew._internal.prefect_errors import TRANSPORT_ERRORS

    until, is_up = time.monotonic() + START_WITHIN, False
    with httpx.Client(trust_env=False) as client:
        while not is_up:
            if process.poll() is not None or time.monotonic() > until:
                why = "it gave no answer" if process.returncode is None else f"its exit code is {process.returncode}"
                raise PrefectAwayError(
                    f"Prefect's embedded server did not start: {why}. Try `prefect server start`, which shows more."
                )
            time.sleep(0.05)
            with suppress(*TRANSPORT_ERRORS):
                is_up = client.get(url).is_success


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the embedded server after Prefect's threads have sent their logs and events, or after some 10 s."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    try:
        if process.poll() is None:
            APILogWorker.drain_all(timeout=3)
            EventsWorker.drain_all(timeout=3)
    finally:  # a further signal may have come
        process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
