"""The webhooks that a kickoff gets by itself, once the receiver's address and secret are set."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.api.webhooks import RUN_ENDS, HumanInputWebhook, Webhooks
from prefect_crew.receiver.signing import claim_of, hook_urls
from prefect_crew.records import utcnow
from prefect_crew.settings import CrewSettings

if TYPE_CHECKING:
    from prefect_crew.crew import Crew
    from prefect_crew.waiting import WaitPolicy

__all__ = ["hooks_expire", "names_shown", "webhooks_for"]

CLOUD = "api.prefect.cloud"
MARGIN = 86_400.0
"""Seconds for which a webhook is still taken after all budgets of its run are spent."""
UNLIMITED = 30 * 86_400.0
"""Seconds that count for a budget without a limit."""


def webhooks_for(
    crew: Crew,
    run_key: str,
    *,
    attempt: int | None = None,
    owner: str | None = None,
    round: int = 0,  # noqa: A002 - the word of the domain
    wait: WaitPolicy | None = None,
    settings: CrewSettings | None = None,
) -> Webhooks | None:
    """Return the webhooks of one run as the settings have them, None where they switch no webhooks on.

    They are for its kickoff, and for each `/resume` again, the first of which is round 1. With an address of Prefect
    Cloud's own webhooks, all kinds go there and no secret is needed.

    `owner` is that of the attempt's record, which no webhook of another's run can then resolve.

    Raises:
        ConfigurationError: The address is set without a secret, or one of them cannot be used.
    """
    chosen = settings or CrewSettings()
    url, secret = chosen.webhook_url, chosen.webhook_secret
    if not url:
        return None
    if _of_cloud(url):
        return Webhooks(task=url, step=url, crew=url, human_input=HumanInputWebhook(url=url))
    if secret is None:
        raise ConfigurationError(
            "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL is set without PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET. Set the "
            "secret that the receiver has, or unset the URL: runs are then found to have ended by polling alone."
        )
    return hook_urls(
        url,
        secret,
        run_key,
        expires=hooks_expire(wait or crew.wait, utcnow()),
        attempt=attempt,
        claim=None if owner is None else claim_of(owner),
        names=names_shown(crew),
        round=round,
        stream_events=RUN_ENDS,
        realtime=True,
    )


def hooks_expire(wait: WaitPolicy, now: datetime) -> datetime:
    """Return until when a run's webhooks are taken: as long as anybody may wait for it, and a day more."""
    budgets = (wait.timeout, wait.human_timeout)
    return now + timedelta(seconds=sum(UNLIMITED if one is None else one for one in budgets) + MARGIN)


def names_shown(crew: Crew) -> bool:
    """Return whether names of tasks and agents may stand in events about webhooks.

    A crew may put an input into such a name, and the receiver does not know the secret ones: with any, none is shown.
    """
    return crew.show != "none" and not crew.secret_inputs


def _of_cloud(url: str) -> bool:
    parts = urlsplit(url.strip())
    return parts.scheme == "https" and parts.hostname == CLOUD and parts.path.startswith("/hooks/")
