"""Real Prefect workers, and the flow runs that they start."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process


class Worker:
    """A `prefect worker start`; a context manager.

    Args:
        server: The server it asks for work.
        pool: The work pool; made if there is none of this name.
        name: The worker's name, for a second one of the same pool; that of the pool if left out.
        folder: Where it runs (so where relative entrypoints are looked up), and where it keeps its log.
        home: Its PREFECT_HOME, so where its flow runs store results; one in `folder` if left out.
        poll: Seconds between two looks for work.
        env: More variables, for it and its flow runs.
        limit: How many flow runs it has at once; no limit if left out.
        kind: The type of worker.

    Attributes:
        log: The file with its output and that of its flow runs.
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
        self._limit = [] if limit is None else ["--limit", str(limit)]
        self._kind = kind
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process, for tests that hurt it. `family()` tells it and its flow runs."""
        if self._process is None:
            raise RuntimeError("this worker was never started: call start()")
        return self._process

    def start(self, timeout: float = 60.0) -> Worker:
        """Start it and wait until it says that it has started.

        Raises:
            ProcessError: It ended, or did not start within `timeout` seconds; with the end of its log.
        """
        self._process = Process(
            [
                *(
                    program("prefect"),
                    "worker",
                    "start",
                    "--pool",
                    self.pool,
                    "--type",
                    self._kind,
                    "--name",
                    self.name,
                ),
                *self._limit,
            ],
            log=self.log,
            env=self._env,
            cwd=self._folder,
        )
        try:
            self._process.wait_for("started!", timeout)
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

    def kill(self) -> None:
        """SIGKILL for the worker and its flow runs: the machine is gone."""
        self.process.kill()

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
