"""Scripted crews for tests, as the YAML text that the local crew server takes."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import yaml

from prefect_crew.devserver import CrewScript
from prefect_crew.devserver._runs import Outcome, Run
from prefect_crew.devserver._scripts import ScriptedProgram


def script(*tasks: dict[str, Any], inputs: Sequence[Any] = (), **more: Any) -> str:
    """Return a crew of these tasks; a task without a name gets one."""
    named = [{"name": f"task_{number}", **task} for number, task in enumerate(tasks, start=1)]
    return yaml.safe_dump({"name": "crew", "inputs": list(inputs), "tasks": named, **more}, allow_unicode=True)


def slow(seconds: float, output: str = "done") -> str:
    return script({"seconds": seconds, "output": output})


FAILS = script({"fail": "the search engine is down"})
"""A crew that fails at once."""

PICKY = script({"output": "on {{ topic }}", "fail": "{{ 'no ' + topic if 'bad' in topic }}"}, inputs=["topic"])
"""A crew that fails with a topic that is bad."""

ASKS = script(
    {"name": "draft", "seconds": 0.3, "output": "a draft {{ feedback }}", "human": True},
    {"name": "print", "seconds": 0.3, "output": "printed"},
)
"""A crew that waits for a person once."""


JOURNAL = script(
    {
        "output": "{{ state.turn }} {{ note }}{% if state.output %} after {{ state.output }}{% endif %}",
        "seconds": "{{ 1.5 if note == 'slow' else 0 }}",
    },
    {"output": "{{ previous }}", "fail": "{{ 'the pen is broken' if note == 'bad' else '' }}"},
    inputs=["note"],
    flow=True,
)
"""A Flow that keeps a state. After "bad" it fails, and has stored a state of its own by then."""


class Held(ScriptedProgram):
    """A crew whose runs end once `most` have begun, or after ten minutes, and each report so many tokens."""

    def __init__(self, most: int, *, tokens: int) -> None:
        usage = {"total_tokens": tokens, "prompt_tokens": tokens, "completion_tokens": 0}
        tasks = [{"name": "t", "output": "done"}]
        super().__init__(CrewScript.model_validate({"name": "c", "inputs": ["text"], "usage": usage, "tasks": tasks}))
        self.most, self.begun = most, 0

    async def execute(self, run: Run) -> Outcome:
        self.begun += 1
        until = time.monotonic() + 600
        while self.begun < self.most and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return await super().execute(run)
