"""The crew API over HTTP, without Prefect: a client, its models, and the webhooks that a kickoff may ask for.

Names are loaded at their first use, to save import time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew._internal.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.client._client import CrewClient
    from prefect_crew.client.models import (
        CrewInput,
        CrewResult,
        CrewStatus,
        ResumeAnswer,
        Review,
        ReviewRequest,
        StopAnswer,
        StopOutcome,
        TaskResult,
        TokenUsage,
    )
    from prefect_crew.client.webhooks import BasicAuth, BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks

__all__ = [
    "BasicAuth", "BearerAuth", "CrewClient", "CrewInput", "CrewResult", "CrewStatus", "HumanInputWebhook",
    "ResumeAnswer", "Review", "ReviewRequest", "StopAnswer", "StopOutcome", "StreamWebhook", "TaskResult", "TokenUsage",
    "Webhooks",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_client": "CrewClient",
        "models": "CrewInput CrewResult CrewStatus ResumeAnswer Review ReviewRequest StopAnswer StopOutcome TaskResult "
        "TokenUsage",
        "webhooks": "BasicAuth BearerAuth HumanInputWebhook StreamWebhook Webhooks",
    },
)
