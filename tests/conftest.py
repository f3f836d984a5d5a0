"""Fixtures for all tests, and the rules of a test run.

- Nothing of your own Prefect is touched: home, profile, server and keys of whoever runs the tests are out of reach.
- No embedded Prefect server is started by surprise: a test that talks to Prefect asks for `prefect_api`.
- What a test needs and this machine lacks is skipped, counted and named at the end, never without a message.
- No test leaves a process behind: those that do make the run fail.
- With `--reruns 1`, as in `make test`, a failed test is tried once more, and named at the end under TRIED AGAIN. A test
  of a promise is tried again only where something came too late: a second start must not be tried away.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from support.chromium import Chromium, find_chromium
from support.environment import PRIVATE, QUIET, trust_hardly_anyone
from support.postgres import Postgres, find_postgres
from support.prefect_server import PrefectServer, connected, free_port
from support.processes import MARK, survivors
from support.proxy import Proxy, through
from support.waiting import TooLateError

if TYPE_CHECKING:
    from support.seen import Seen

TESTS = Path(__file__).parent
SESSION = uuid.uuid4().hex
HOME = Path(tempfile.mkdtemp(prefix="prefect-crew-tests-"))

for name in [name for name in os.environ if name.startswith(PRIVATE) and name != MARK]:
    del os.environ[name]
os.environ.update(QUIET)
trust_hardly_anyone(HOME)
os.environ["PREFECT_HOME"] = str(HOME)
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
# Whatever a test starts, by whatever means, bears this; see pytest_sessionfinish.
os.environ[MARK] = ",".join(filter(None, (os.environ.get(MARK), SESSION)))
if "prefect" in sys.modules:  # imported by a pytest plugin, with the settings of whoever runs the tests
    sys.modules["prefect.context"].refresh_global_settings_context()

if "PYTEST_XDIST_WORKER" in os.environ:  # `make coverage` measures this process, and none that a test starts
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)

# Two shared cores make any deadline a coin toss.
# And a gate gives the same answer twice: what is random runs each night.
hypothesis.settings.register_profile(
    "prefect-crew", deadline=None, print_blob=True, derandomize="CI" in os.environ and "NIGHTLY" not in os.environ
)
hypothesis.settings.load_profile("prefect-crew")


# The run


QUICK = "not slow and not programs and not heavy and not proofs"
"""What plain `pytest` runs. Naming a file or a test runs all of it; `-m` and `--sample` say what else is meant."""


def pytest_configure(config: pytest.Config) -> None:
    nothing_is_named = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr
    if nothing_is_named and config.option.sample is None:
        config.option.markexpr = QUICK
    own = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() == own:
            # Servers and workers live in sessions of their own: only the fixtures can end them.
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a fork of ours, which inherited this
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell's background jobs have it, and all that they start: Ctrl-C could not be tested.
        signal.signal(signal.SIGINT, signal.default_int_handler)


_SAMPLE = pytest.StashKey[tuple[int, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    option = parser.getgroup("prefect-crew").addoption
    option("--sample", type=int, metavar="N", help="of the slow tests, run N that the seed chooses, before all others")
    option("--seed", type=int, metavar="S", default=1, help="the seed of that choice, and of random worlds (1)")


@pytest.hookimpl(trylast=True)  # after -m and -k have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size: int | None = config.getoption("sample")
    if size is None:
        return
    # Sorted, so that a seed means the same tests whatever the order of collection is.
    slow = sorted((item for item in items if item.get_closest_marker("slow")), key=lambda item: item.nodeid)
    chosen = set(random.Random(config.getoption("seed")).sample(slow, min(size, len(slow))))
    config.stash[_SAMPLE] = (len(chosen), len(slow))
    config.hook.pytest_deselected(items=[item for item in slow if item not in chosen])
    items[:] = [item for item in items if item in chosen] + [item for item in items if item not in {*slow}]


PROGRAMS = (
    "test_docs.py",
    "test_worker.py",
    "deployments/",
    "flows/",
    "examples/",
    "cli/test_demo.py",
    "cli/test_deploy.py",
    "cli/test_doctor.py",
    "devserver/test_crewai",
    "batches/test_cancel.py",
    "client/test_linear_time.py",
)
"""Tests that mostly start programs: pages of the documentation, deployments, workers, the command line, CrewAI. There
are few, and they take more CPU time than all others."""

HEAVY = (
    "artifacts/test_telemetry.py",
    "batches/",
    "cli/",
    "pipelines/",
    "receiver/",
    "runs/reviews/",
    "runs/test_owners.py",
    "runs/test_stop.py",
    "test_budgets.py",
    "test_deployments.py",
)
"""Of these, the tests on a Prefect server or on PostgreSQL take most CPU time of what starts no program."""


def _is_only_late(error: BaseException) -> bool:
    """Whether nothing but a wait has failed, as an assertion before the wait of a clean-up."""
    return isinstance(error, TooLateError) and isinstance(error.__context__, TooLateError | TimeoutError | None)


def pytest_itemcollected(item: pytest.Item) -> None:
    path, fixtures = item.path.relative_to(TESTS).as_posix(), getattr(item, "fixturenames", ())
    if path.startswith(("proof/", "outcomes/")):
        item.add_marker("proofs")
        if item.config.getoption("reruns"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=TooLateError, condition=_is_only_late))
    elif path.startswith(PROGRAMS) or "alone" in fixtures:
        item.add_marker("programs")
    elif path.startswith(HEAVY) and {"prefect_server", "postgres"} & {*fixtures}:
        item.add_marker("heavy")
    if "postgres" in fixtures:
        item.add_marker("postgres")
    if "chromium" in fixtures:
        item.add_marker("browser")
    if item.get_closest_marker("crewai") and importlib.util.find_spec("crewai") is None:
        item.add_marker(pytest.mark.skip(reason="needs the extra `crewai` (Python below 3.14)"))


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    if _SAMPLE not in config.stash:
        return None
    kept, total = config.stash[_SAMPLE]
    size, seed = config.getoption("sample"), config.getoption("seed")
    return f"sample: {kept} of {total} slow tests; the same again: --sample {size} --seed {seed}"


@pytest.hookimpl(trylast=True)  # after pytest-xdist has ended its workers, which bear the mark as well
def pytest_sessionfinish(session: pytest.Session) -> None:
    deadline = time.monotonic() + ENDING
    while (left := survivors(SESSION)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left_behind = session.config.stash.setdefault(LEFT_BEHIND, {})
    left_behind.update(left)
    if left_behind:
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker of pytest-xdist, whose end goes to pytest_testnodedown
        output["left_behind"] = ([*left_behind.items()], session.config.stash.get(NOTES, []))
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    left, notes = getattr(node, "workeroutput", {}).get("left_behind", ((), ()))
    node.config.stash.setdefault(LEFT_BEHIND, {}).update(left)
    node.config.stash.setdefault(NOTES, []).extend(notes)


LEFT_BEHIND = pytest.StashKey[dict[int, str]]()
NOTES = pytest.StashKey[list[str]]()
ENDING = 10.0
"""Seconds that processes may take to end once the tests have ended."""


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    needs = {reason: count for reason, count in reasons.items() if reason.startswith("needs ")}
    if needs:
        terminalreporter.section("NOT TESTED HERE", yellow=True, bold=True)
        for reason, count in sorted(needs.items()):
            terminalreporter.line(f"{count} skipped: {reason}", yellow=True)
    if failed_once := terminalreporter.stats.get("rerun"):
        terminalreporter.section("TRIED AGAIN", yellow=True, bold=True)
        for report in failed_once:
            crash = getattr(report.longrepr, "reprcrash", None)
            first_line = (str(report.longrepr) if crash is None else crash.message).partition("\n")[0]
            terminalreporter.line(f"{report.nodeid} failed first: {first_line[:300]}", yellow=True)
    for note in config.stash.get(NOTES, []):
        terminalreporter.line(note)
    if left := config.stash.get(LEFT_BEHIND, None):
        terminalreporter.section("PROCESSES LEFT BEHIND", red=True, bold=True)
        for pid, command in left.items():
            terminalreporter.line(f"{pid} {command[:200]} (killed now; the run has failed)", red=True)


# Fixtures


@pytest.fixture(scope="session")
def notes(pytestconfig: pytest.Config) -> list[str]:
    """Lines to print at the end of the run."""
    return pytestconfig.stash.setdefault(NOTES, [])


@pytest.fixture(scope="session")
def prefect_template(pytestconfig: pytest.Config) -> Path | None:
    """Where a migrated database of this Prefect is kept between runs; None with `-p no:cacheprovider`."""
    import prefect

    cache = getattr(pytestconfig, "cache", None)
    return cache.mkdir("prefect") / f"{prefect.__version__}.db" if cache else None


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[PrefectServer]:
    """A real Prefect server on SQLite, one for the session: share it, do not stop it. Start your own to hurt one."""
    with PrefectServer(tmp_path_factory.mktemp("prefect-server"), template=prefect_template) as server:
        yield server


@pytest.fixture
def prefect_api(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[PrefectServer]:
    """This process is a client of `prefect_server`, with a Prefect home of the test's own."""
    prefect_server.forget_store()
    with connected(prefect_server, tmp_path / "prefect-home"):
        yield prefect_server


@pytest.fixture
def proxy(prefect_server: PrefectServer) -> Iterator[Proxy]:
    """A way to the server that can be cut; this process takes it."""
    with through(prefect_server) as way:
        yield way


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's client, which tries a refused connection three more times, does so without its pauses of 1.5 s."""
    for kind in ("_async", "_sync"):
        monkeypatch.setattr(f"httpcore.{kind}.connection.RETRIES_BACKOFF_FACTOR", 0)


@pytest.fixture
def away(no_pause: None) -> Iterator[str]:
    """This process is a client of a Prefect API that does not answer, with this URL."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL, one for the session: `postgres.create_database(name)` gives a URL for Prefect."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("needs PostgreSQL's initdb and postgres (Debian: apt-get install postgresql)")
    with Postgres(programs) as server:
        yield server


@pytest.fixture(scope="session")
def prefect_server_on_postgres(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[PrefectServer]:
    """A real Prefect server on PostgreSQL, one for the session; use `connected(server, home)` to be its client."""
    folder = tmp_path_factory.mktemp("prefect-server-on-postgres")
    with PrefectServer(folder, database_url=postgres.create_database("prefect")) as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """A real browser, one for the session: `chromium.page()` gives a fresh page."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Chromium(executable) as browser:
        yield browser


@pytest.fixture
def seen(prefect_api: PrefectServer) -> Iterator[Seen]:
    """What stands on the test's Prefect server."""
    from support.seen import Seen  # imports Prefect, which reads its settings: not before they are those of the tests

    reader = Seen(prefect_api)
    yield reader
    reader.close()


@pytest.fixture(autouse=True)
def own_crew_database(crew_database: Path) -> None:
    """Each test has a crew database of its own, which the processes that it starts share."""
