"""Real Prefect workers, and the flow runs that they start."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process, Program


class Worker(Program):
    """A `prefect worker start`.

    It runs in `folder`, where relative entrypoints are looked up and its log is kept; `home` is its PREFECT_HOME, `env`
    are more variables for it and its flow runs, `poll` the seconds between two looks for work.
    """

    def __init__(
        self,
        server: PrefectServer,
        pool: str,
        *,
        folder: Path,
        name: str | None = None,
        home: Path | None = None,
        poll: float = 1.0,
        env: Mapping[str, str] | None = None,
        limit: int | None = None,
        kind: str = "process",
    ) -> None:
        self.pool = pool
        self.name = name or pool
        self.log = folder / f"worker-{self.name}.log"
        self._folder = folder
        self._env = server.env(
            home=home or folder / f"{self.name}-home",
            PREFECT_WORKER_QUERY_SECONDS=str(poll),
            PREFECT_RUNNER_POLL_FREQUENCY=str(max(1, round(poll))),
            # A flow's own output is part of this log: it must not wait in a buffer when the process is killed.
            PYTHONUNBUFFERED="1",
            **(env or {}),
        )
        self._options = ["--name", self.name, *([] if limit is None else ["--limit", str(limit)])]
        self._kind = kind

    def start(self) -> Self:
        """Start it and wait until it says that it has started."""
        self._process = Process(
            [program("prefect"), *f"worker start --pool {self.pool} --type {self._kind}".split(), *self._options],
            log=self.log,
            env=self._env,
            cwd=self._folder,
        )
        try:
            self._process.wait_for("started!")
        except BaseException:
            self._process.kill()
            raise
        return self

    def stop(self, grace: float = 5.0) -> None:
        """End it and its flow runs: SIGTERM, once more `grace` seconds later, then SIGKILL. Harmless if it is gone.

        A worker in the background does not always believe the first SIGTERM.
        """
        if self._process is not None:
            self._process.stop(signal.SIGTERM, grace=grace, again=signal.SIGTERM)
