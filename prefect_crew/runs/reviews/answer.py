"""WIP."""

from __future__ import annotations

from typing import Any


async def resume_run(run: Any, **options: Any) -> Any:
    raise NotImplementedError
