"""Commands of `prefect-crew` in processes of their own."""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.environment import isolated, program

TOKEN = "token-of-the-cli-tests"
"""What `CREW_TOKEN` holds."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def ok(self) -> str:
        """Return the output of a command that has to succeed."""
        assert self.code == 0, self.err
        return self.out

    def error(self, code: int) -> str:
        """Return the errors of a command that has to fail with this code."""
        assert self.code == code, self.out + self.err
        return self.err


Command = Callable[..., Finished]


def environment(home: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment without a Prefect server, in which none may be started, unless `env` says otherwise."""
    return isolated(home, {"CREW_TOKEN": TOKEN, "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false", **(env or {})})


def outside(home: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60) -> Finished:
    """Run a command to its end, within `timeout` seconds."""
    done = subprocess.run(
        [program("prefect-crew"), *arguments],
        env=environment(home, env),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    return Finished(done.returncode, done.stdout, done.stderr)
