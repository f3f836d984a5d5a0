"""A real PostgreSQL of the tests' own, from Debian's package or whatever is on PATH."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from support.prefect_server import free_port
from support.processes import Process, ProcessError, Program
from support.waiting import LIMIT, wait_until

DEBIAN = "/usr/lib/postgresql"
SUPERUSER = "crew"


def find_postgres() -> Path | None:
    """Return the folder with the newest server and its client programs, None where there is none."""
    # Debian keeps the server's programs off PATH, in a folder for each version.
    folders = sorted(Path(DEBIAN).glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    if initdb := shutil.which("initdb"):
        folders.append(Path(initdb).resolve().parent)
    needed = ("initdb", "postgres", "pg_isready", "createdb")
    return next((folder for folder in folders if all((folder / name).exists() for name in needed)), None)


class Postgres(Program):
    """A PostgreSQL server on a free loopback port, with a data folder that is removed at the end.

    PostgreSQL refuses to run as root: then it runs as `postgres`, or as `nobody` where there is no such user.
    """

    NOT_DURABLE: tuple[str, ...] = ("fsync", "synchronous_commit", "full_page_writes")
    """Settings that are off: durability against a power cut is not what the tests look at."""

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        self.port = free_port()
        known = {user.pw_name for user in pwd.getpwall()}
        self._user = next(name for name in ("postgres", "nobody") if name in known) if os.geteuid() == 0 else None
        # Not below pytest's own folder, which other users may not enter.
        self._folder = Path(tempfile.mkdtemp(prefix="prefect-crew-postgres-"))
        self.log = self._folder / "postgres.log"

    def start(self) -> Self:
        """Make the database cluster and start it; about 3 seconds."""
        data = self._folder / "data"
        data.mkdir(mode=0o700)
        if self._user:
            self._folder.chmod(0o755)
            shutil.chown(data, self._user)
        options = "--auth trust --no-sync --encoding UTF8 --no-locale --username"
        made = self._run("initdb", "--pgdata", data, *options.split(), SUPERUSER)
        if made.wait() != 0:
            raise ProcessError(f"initdb failed:\n{made.tail()}")
        return self.serve()

    def _run(self, name: str, *arguments: str | Path) -> Process:
        return Process([self.programs / name, *arguments], log=self.log, cwd=self._folder / "data", user=self._user)

    def serve(self) -> Self:
        """Start it over its data, also once more after it was killed."""
        options = ["listen_addresses=127.0.0.1", f"port={self.port}", "unix_socket_directories=", "max_connections=200"]
        flags = [
            part for option in [*options, *(f"{name}=off" for name in self.NOT_DURABLE)] for part in ("-c", option)
        ]
        self._process = process = self._run("postgres", "-D", self._folder / "data", *flags)

        def is_ready() -> bool:
            if not process.running:
                raise ProcessError(f"PostgreSQL did not start:\n{process.tail()}")
            return self._ask("pg_isready", "-q").returncode == 0  # else nobody listens yet, or it is starting up

        wait_until(is_ready, "PostgreSQL answers", pause=0.1)
        return self

    def create_database(self, name: str) -> str:
        """Create a database (a plain word) and return its URL, as SQLAlchemy and Prefect write it."""
        self._ask("createdb", name).check_returncode()
        return f"postgresql+asyncpg://{SUPERUSER}:unused@127.0.0.1:{self.port}/{name}"

    def _ask(self, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        address = ["-h", "127.0.0.1", "-p", str(self.port), "-U", SUPERUSER]
        return subprocess.run([self.programs / program, *address, *arguments], timeout=LIMIT)

    def stop(self) -> None:
        """End it and remove its data. Harmless if it does not run."""
        if self._process is not None:
            self._process.stop(signal.SIGINT)  # PostgreSQL's "fast" shutdown: SIGTERM would wait for every client
        shutil.rmtree(self._folder, ignore_errors=True)
