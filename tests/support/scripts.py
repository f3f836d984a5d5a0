"""Scripted crews for tests, as the YAML text that the local crew server takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def script(*tasks: dict[str, Any], inputs: Sequence[Any] = (), **more: Any) -> str:
    """Return a crew of these tasks; a task without a name gets one."""
    named = [{"name": f"task_{number}", **task} for number, task in enumerate(tasks, start=1)]
    return yaml.safe_dump({"name": "crew", "inputs": list(inputs), "tasks": named, **more}, allow_unicode=True)


def slow(seconds: float, output: str = "done") -> str:
    return script({"seconds": seconds, "output": output})


FAILS = script({"fail": "the search engine is down"})
"""A crew that fails at once."""

ASKS = script(
    {"name": "draft", "seconds": 0.3, "output": "a draft {{ feedback }}", "human": True},
    {"name": "print", "seconds": 0.3, "output": "printed"},
)
"""A crew that waits for a person once."""
