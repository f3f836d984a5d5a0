"""The webhook receiver: what a crew's server posts becomes events on the Prefect server.

    from prefect_crew.receiver import create_receiver

    app.mount("/crews", create_receiver())        # into your own ASGI app

Each event is about the run that the URL was made for:

    crew.webhook.task, .step, .crew, .human_input     one delivery
    crew.webhook.stream.<type>                        one event of a delivery to the stream

A webhook is news, not proof: whoever is woken by one asks the status call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew._internal.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.receiver.app import create_receiver
    from prefect_crew.receiver.serve import serve_receiver

__all__ = ["create_receiver", "serve_receiver"]

__getattr__, __dir__ = lazy_names(__name__, {"app": "create_receiver", "serve": "serve_receiver"})
