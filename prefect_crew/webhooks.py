"""Webhooks: the URLs that each run gets of its own, and the receiver that turns what comes there into Prefect events.

The public place of `prefect_crew.receiver`. Names are loaded when they are first used: a kickoff needs the URLs only,
not the receiver.

    from prefect_crew.webhooks import create_receiver

    app.mount("/crews", create_receiver())        # into your own ASGI app

What arrives becomes events, each about the run that the URL was made for:

    crew.webhook.task, .step, .crew, .human_input     one delivery
    crew.webhook.stream.<type>                        one event of a delivery to the stream

A webhook is news, not proof: whoever is woken by one asks the status call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.receiver.app import HandsOn, create_receiver
    from prefect_crew.receiver.handover import Handover
    from prefect_crew.receiver.news import News
    from prefect_crew.receiver.serving import serve_receiver
    from prefect_crew.receiver.settling import Settlement, settle_from_webhook
    from prefect_crew.receiver.signing import Hook, hook_urls, read_token
    from prefect_crew.receiver.targets import hooks_expire, names_shown, webhooks_for

__all__ = [
    "Handover",
    "HandsOn",
    "Hook",
    "News",
    "Settlement",
    "create_receiver",
    "hook_urls",
    "hooks_expire",
    "names_shown",
    "read_token",
    "serve_receiver",
    "settle_from_webhook",
    "webhooks_for",
]

_HOMES = {
    "Handover": "handover",
    "HandsOn": "app",
    "Hook": "signing",
    "News": "news",
    "Settlement": "settling",
    "create_receiver": "app",
    "hook_urls": "signing",
    "hooks_expire": "targets",
    "names_shown": "targets",
    "read_token": "signing",
    "serve_receiver": "serving",
    "settle_from_webhook": "settling",
    "webhooks_for": "targets",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, package="prefect_crew.receiver")
