"""The webhook receiver: it writes news and questions of runs into the crew database, and emits an event of each.

    from prefect_crew.receiver import create_receiver

    app.mount("/crews", create_receiver())        # into your own ASGI app

A webhook is news, not proof: a process that a webhook wakes makes the status call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew._internal.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.receiver.app import create_receiver
    from prefect_crew.receiver.serve import serve_receiver

__all__ = ["create_receiver", "serve_receiver"]

__getattr__, __dir__ = lazy_names(__name__, {"app": "create_receiver", "serve": "serve_receiver"})
