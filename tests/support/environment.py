"""Environments for processes: nothing of the person who runs the tests, their profile, server or keys, gets in."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import certifi

BIN = Path(sys.executable).parent
"""Where the programs of this environment are: `BIN / "prefect-crew"`."""

PRIVATE = ("PREFECT_", "CREW_", "CREWAI_", "OTEL_")
"""What a variable of the caller's starts with, that would change what a test sees."""

KEPT = ("PREFECT_CREW_TEST_PROCESS", "PREFECT_INTEGRATIONS_CREW_DATABASE_URL")
"""Private all the same, but the mark of `processes`, and the crew database: what a test starts belongs to both."""

QUIET = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_COLORS": "false",
}

CERTIFICATES = "SSL_CERT_FILE"
"""The variable that names the file of the certificate authorities to trust."""
ONLINE = "TESTS_ONLINE_CERTIFICATES"
"""The variable that keeps the name of the file that was trusted before, for processes of pytest-xdist as well."""
os.environ.setdefault(ONLINE, os.environ.get(CERTIFICATES, ""))


def trust_hardly_anyone(folder: Path) -> None:
    """Have this process, and all that it starts, trust one certificate authority.

    An HTTP client reads all that it trusts, which takes 5 ms for each client of the usual list, and a test with Prefect
    makes ten. No test asks a server of the internet: `online` is for what installs packages.
    """
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first, _, _ = certifi.contents().partition(end)
    path = folder / "authority.pem"
    path.write_text(f"{begin}{first.partition(begin)[2]}{end}\n")
    os.environ[CERTIFICATES] = str(path)


def online() -> dict[str, str]:
    """Return this process's environment with the authorities of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if name != CERTIFICATES}
    return {**kept, CERTIFICATES: os.environ[ONLINE]} if os.environ[ONLINE] else kept


def isolated(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the whole environment for a process whose Prefect home is `home`.

    It starts from the caller's environment without anything of Prefect's, CrewAI's or of this package's. The programs
    of the tests' own environment come first on its PATH. `extra` is laid over it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE) or name in KEPT}
    kept["PATH"] = os.pathsep.join((str(BIN), os.environ.get("PATH", os.defpath)))
    kept["PREFECT_HOME"] = str(home)
    return {**kept, **QUIET, **(extra or {})}


def program(name: str) -> str:
    """Return the path of a program of this environment, such as `prefect` or `prefect-crew`."""
    path = BIN / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not in the environment of the tests: run `make test`, or install .[all].")
    return str(path)
