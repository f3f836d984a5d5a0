"""Crews that do what no script says: one that goes on when the test says so, and one whose first run fails."""

import asyncio
import threading
from collections.abc import Callable

from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.devserver import Outcome, ProgramError, Run, load_program


class Held:
    """A crew whose tasks run until `release()`, or until `until(number of the task)`, and whose `output` is "done".

    Serve it as any other: `crew_server(held)`. A task named "draft" waits for a person instead.
    """

    name = "held"

    def __init__(self, *tasks: str, until: Callable[[int], bool] | None = None) -> None:
        self.output = "done"
        self._tasks = tasks or ("task_1",)
        self._released = threading.Event()
        self._until = until or (lambda _: self._released.is_set())

    def release(self) -> None:
        self._released.set()

    def inputs(self) -> list[CrewInput]:
        return []

    async def execute(self, run: Run) -> Outcome:
        """Run the tasks one after the other."""
        run.plan([*self._tasks])
        for number, name in enumerate(self._tasks, start=1):
            run.task_started(name)
            if name == "draft":
                await run.ask(task_id=name, output="a draft")
            else:
                while not self._until(number):
                    await asyncio.sleep(0.005)
            run.task_ended(TaskResult(name=name, output=self.output))
        return Outcome(self.output)


class FailsFirst:
    """A crew whose first run fails; all others are those of another program."""

    name = "fails-first"

    def __init__(self, program: str = "echo", **options: float) -> None:
        self._program = load_program(program, **options)
        self._runs = 0

    def inputs(self) -> list[CrewInput]:
        return self._program.inputs()

    async def execute(self, run: Run) -> Outcome:
        """Fail the first time."""
        self._runs += 1
        if self._runs == 1:
            raise ProgramError("the editor is out for lunch")
        return await self._program.execute(run)
