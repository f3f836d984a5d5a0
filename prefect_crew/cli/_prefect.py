"""The Prefect API as a command needs it: reachable, quiet, and gone afterwards where it was started for the command."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect_crew.cli import _output
from prefect_crew.exceptions import PrefectAwayError

if TYPE_CHECKING:
    from prefect_crew.cli._progress import Progress


START_WITHIN = 120
"""Seconds for the embedded server: it makes its database the first time, and machines are slow."""
ANSWER_WITHIN = 10.0
"""Seconds for the first answer of a server that is set."""


class Prefect(NamedTuple):
    """The API that commands use. `url` is None for the embedded one."""

    url: str | None

    @property
    def embedded(self) -> bool:
        """Whether it lives only as long as this command."""
        return self.url is None


def reach_prefect(
    progress: Progress, *, quiet: bool = True, lasting: bool = False, meanwhile: Sequence[str] = ()
) -> Prefect:
    """Import Prefect and make sure that its API answers: the one that is set, else Prefect's embedded server.

    Args:
        progress: Is told what is waited for.
        quiet: Whether Prefect's own logs are kept off this terminal.
        lasting: Whether the server has to outlast this command, so that the embedded one will not do.
        meanwhile: Modules that are needed next, to be imported while the embedded server starts.

    Raises:
        PrefectAwayError: It does not answer, or none is set and Prefect may not start its own.
    """
    progress.phase("Loading Prefect")
    importlib.import_module("prefect.main")  # which sets the logging up that quiet_logs changes
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = settings.api.url
    if quiet:
        quiet_logs(progress.note)
    if url:
        progress.phase(f"Asking the Prefect API at {url}")
        _check(url)
    elif lasting:
        raise PrefectAwayError(
            "No Prefect API is set, and this needs a Prefect server that stays: start one with `prefect server start`, "
            "then set PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    elif not settings.server.ephemeral.enabled:
        raise PrefectAwayError(
            "No Prefect API is set, and Prefect may not start its embedded server (PREFECT_SERVER_ALLOW_EPHEMERAL_MODE "
            "is false). Start a server with `prefect server start`, then set PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    else:
        progress.phase("Starting Prefect's embedded server", "10 to 20 seconds the first time")
        _start_embedded(meanwhile)
    progress.done(f"Prefect answers at {url}" if url else "Prefect's embedded server is up")
    return Prefect(url)


def _check(url: str) -> None:
    import httpx
    from prefect.client.orchestration import get_client

    with get_client(httpx_settings={"timeout": ANSWER_WITHIN}, sync_client=True) as client:
        problem = client.api_healthcheck()
    # Any answer will do: what a server thinks of /health is not what matters.
    if isinstance(problem, httpx.TransportError):
        raise PrefectAwayError(
            f"The Prefect API at {url} does not answer: {problem or type(problem).__name__}. Start that server, or set "
            "PREFECT_API_URL to one that runs; without PREFECT_API_URL Prefect starts an embedded one."
        ) from None


class _Embedded(threading.Thread):
    """Starts Prefect's embedded server where Ctrl-C does not reach it.

    The keys send SIGINT to every process of the terminal, so the server would stop before the crew's stop is on record.
    A thread's signal mask is inherited by the processes that it starts; and since only the main thread is interrupted,
    there is no moment at which the server runs and nobody knows it.
    """

    def __init__(self) -> None:
        super().__init__(name="prefect-embedded-server", daemon=True)
        from prefect.server.api.server import SubprocessASGIServer

        self.server = SubprocessASGIServer()
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        """Start it and wait until it answers."""
        try:
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with _quiet_server():
                self.server.start(timeout=START_WITHIN)
        except BaseException as error:  # noqa: BLE001 - told to the main thread, which waits for it
            self.error = error
        finally:
            self.ended.set()


@contextmanager
def _quiet_server() -> Generator[None]:
    """Let a server that is started meanwhile keep to itself what it copes with, such as a busy database.

    It writes to our terminal, in the middle of whatever is drawn there.
    """
    # The first is the level of its own loggers, the second that of all that goes to its terminal.
    names = ("PREFECT_SERVER_LOGGING_LEVEL", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL")
    missing = [] if _output.debugging() else [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "CRITICAL"))
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


_embedded: _Embedded | None = None


def _start_embedded(meanwhile: Sequence[str]) -> None:
    global _embedded
    if _embedded is not None:
        return
    _embedded = _Embedded()
    _embedded.start()
    for module in meanwhile:
        importlib.import_module(module)
    while not _embedded.ended.wait(0.1):  # short, so that a signal is handled soon on every platform
        pass
    if _embedded.error is not None:
        raise PrefectAwayError(
            f"Prefect's embedded server did not start: {_embedded.error}. Try `prefect server start`, which shows more."
        )


def end_embedded() -> None:
    """End the embedded server if this process has started it; at most about 15 seconds. Call it with SIGINT ignored."""
    global _embedded
    starter, _embedded = _embedded, None
    if starter is None:
        return
    server: Any = starter.server
    until = time.monotonic() + 5
    while server.server_process is None and not starter.ended.is_set() and time.monotonic() < until:
        time.sleep(0.02)
    if starter.ended.is_set() and starter.error is None:
        _drain()
    server.stop()


def _drain() -> None:
    """Send the logs and events that Prefect's threads hold, while there is somebody to take them."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=3)
    EventsWorker.drain_all(timeout=3)


_PACKAGE = str(Path(__file__).parent.parent)
SAY_AGAIN_AFTER = 300.0
"""Seconds after which a command says the same sentence of a log again."""
_ENGINES = ("flow_engine.py", "task_engine.py", "engine.py")


class _Route(logging.Filter):
    """Takes Prefect's console logs over: warnings of ours and errors of Prefect's become notes, the rest goes unseen.

    The logs that Prefect's pages show are not touched. What the engines log about a failed flow is left out, since the
    command says it once, in its own words; but for retries, which somebody has to wait for. What every retry says again
    is said once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.pathname.startswith(_PACKAGE)
        engine = record.pathname.endswith(_ENGINES)
        # Whether a crew that was to be stopped has stopped is news at any level.
        news = record.levelno >= (logging.INFO if record.module == "stopping" else logging.WARNING)
        if (ours and news) or (record.levelno >= logging.ERROR and not engine):
            self._once(record.getMessage().partition("\n")[0])
        elif engine and (retry := _retry(record)):
            self._say(retry)
        return False

    def _once(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(text, -SAY_AGAIN_AFTER) >= SAY_AGAIN_AFTER:
            self._said[text] = now
            self._say(text)


def _retry(record: logging.LogRecord) -> str | None:
    """Return what to say of a task that Prefect is about to retry; None of any other record."""
    if "Retry %s/%s will start" not in str(record.msg) or not isinstance(record.args, tuple) or len(record.args) != 5:
        return None
    _, error, number, most, start = record.args
    when = f"in {str(start).split(' ')[0]} s" if "second" in str(start) else "now"
    task: str = getattr(record, "task_run_name", "A task")
    return f"{task[:1].upper()}{task[1:]} failed ({type(error).__name__}). Retry {number} of {most} {when}."


def quiet_logs(say: Callable[[str], None]) -> None:
    """Send to `say` what matters of the logs that Prefect would write to this terminal. Not after `--debug`."""
    from prefect.logging.handlers import PrefectConsoleHandler

    if _output.debugging():
        return
    restore_logs()
    loggers = [logging.getLogger(), *map(logging.getLogger, tuple(logging.Logger.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, PrefectConsoleHandler):
            route = _Route(say)
            handler.addFilter(route)
            _routed.append((handler, route))


_routed: list[tuple[logging.Handler, _Route]] = []


def restore_logs() -> None:
    """Let Prefect write to this terminal again."""
    while _routed:
        handler, route = _routed.pop()
        handler.removeFilter(route)


def flow_run_url(flow_run_id: str | None) -> str | None:
    """Return where a flow run's page is, None for the embedded server, which has no pages."""
    return _page("flow-run", flow_run_id)


def deployment_url(deployment_id: str) -> str | None:
    """Return where a deployment's page is, None for the embedded server."""
    return _page("deployment", deployment_id)


def _page(kind: str, its_id: str | None) -> str | None:
    if its_id is None or "prefect" not in sys.modules:
        return None
    from prefect.settings import get_current_settings
    from prefect.utilities.urls import url_for

    return url_for(kind, obj_id=its_id) if get_current_settings().ui_url else None
