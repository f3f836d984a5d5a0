"""The webhook URLs of a run: their choice for a kickoff, their signature, and its verification.

    {receiver}/hooks/{kind}/{attempt}.{round}.{texts}.{expires}.{signature}

The signature is an HMAC of what is before it. Everybody who has a URL can send webhooks of one kind about one run,
until it expires.

The setting may hold several secrets, separated by blanks, so that it can be changed while runs are in flight: the first
secret signs, and a signature of any of them is accepted.
"""

from __future__ import annotations

import base64
import hmac
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from prefect_crew._internal.clock import utcnow
from prefect_crew.client._transport import checked_url
from prefect_crew.client.webhooks import RUN_ENDS, BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.settings import CrewSettings
from prefect_crew.store.decision import Attempt

if TYPE_CHECKING:
    from prefect_crew.crew import Crew, WaitPolicy

WebhookKind = Literal["crew", "human_input", "stream"]

SHORTEST_SECRET = 32
"""Characters. An attacker who has one URL can try secrets against it on a machine of their own."""
COMPLETED = "webhook.crew"
"""The news that a crew completed."""
CLOUD = "api.prefect.cloud"
EXPIRY_MARGIN = 86_400.0
"""Seconds for which a webhook is still taken after all budgets of its run are spent."""
UNLIMITED = 30 * 86_400.0
"""Seconds that count for a budget without a limit."""


@dataclass(frozen=True)
class Hook:
    """The purpose of a URL: one kind of webhook of one attempt, until `expires` (aware; whole seconds).

    `attempt` is its id in the crew database. `round` is the number of answers that the run had when we signed the URL.
    `texts`: whether the crew database may contain the text of a question.
    """

    kind: WebhookKind
    attempt: str
    expires: datetime
    round: int = 0
    texts: bool = True


def webhooks_for(
    crew: Crew,
    attempt: Attempt,
    *,
    round: int = 0,  # noqa: A002 - the word of the domain
    settings: CrewSettings | None = None,
    wait: WaitPolicy | None = None,
) -> Webhooks | None:
    """Return the webhooks of one run by the settings, None if these switch no webhooks on.

    They are for its kickoff, and for each `/resume` again, the first of which answers question 1. `wait` is the run's
    policy, if it has one of its own: the URLs live as long as a wait by it, and a day more. Raises ConfigurationError
    if the address or the secret cannot be used.
    """
    settings = settings or CrewSettings()
    url, secret = settings.webhook_url, settings.webhook_secret
    if not url:
        return None
    parts = urlsplit(url.strip())
    if parts.scheme == "https" and parts.hostname == CLOUD and parts.path.startswith("/hooks/"):
        return Webhooks(task=url, step=url, crew=url, human_input=HumanInputWebhook(url=url))  # a receiver of Prefect
    if secret is None:
        raise ConfigurationError(
            "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL is set without PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET. Set the "
            "receiver's secret, or unset the URL. Then polling alone finds out that runs have ended."
        )
    budgets = ((wait or crew.wait).timeout, (wait or crew.wait).human_timeout)
    seconds = sum(UNLIMITED if budget is None else budget for budget in budgets) + EXPIRY_MARGIN
    texts = crew.show == "full" and not crew.secret_inputs
    return hook_urls(url, secret, Hook("crew", attempt.id, utcnow() + timedelta(seconds=seconds), round, texts))


def hook_urls(base_url: str, secret: SecretStr | str, run: Hook) -> Webhooks:
    """Return the webhooks of one run, for its kickoff and for each of its resumes. Equal arguments give equal URLs.

    Args:
        base_url: The receiver's public address; it may have a path, but neither query nor fragment.
        secret: The receiver's secret. If the text holds several secrets, the first one signs the URLs.
        run: The facts about the run, with any `kind`. Everybody who has a URL can read these facts.

    Raises:
        ConfigurationError: The address or the secret cannot be used.
    """
    base, key = checked_url(base_url, allow_http=True, what="The receiver's URL"), checked_secret(secret)
    crew, human_input, stream = (token_of(replace(run, kind=kind), key) for kind in ("crew", "human_input", "stream"))
    return Webhooks(
        crew=f"{base}/hooks/crew/{crew}",
        human_input=HumanInputWebhook(url=f"{base}/hooks/human_input/{human_input}"),
        stream=StreamWebhook(
            url=f"{base}/hooks/stream/{stream}",
            events=list(RUN_ENDS),
            realtime=True,
            # Documented streams have one. What protects this receiver is the URL, as for the other kinds.
            authentication=BearerAuth(token=SecretStr(stream)),
        ),
    )


# Signatures


def token_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the token of a hook's URL."""
    facts = f"{hook.attempt}.{hook.round}.{hook.texts:d}.{int(hook.expires.timestamp())}"
    return f"{facts}.{_signature(_secrets(secret)[0], hook.kind, facts)}"


def read_token(kind: str, token: str, secret: SecretStr | str, *, now: datetime) -> Hook | None:
    """Return the purpose of a URL, None if it is forged, of another kind or stale.

    This compares the signature, in constant time, before it reads anything from the token. `kind` and `token` are those
    of the URL; of several secrets any may have signed.
    """
    facts, _, signature = token.rpartition(".")
    signed = signature.encode("utf-8", "replace")
    if not any(hmac.compare_digest(signed, _signature(key, kind, facts).encode()) for key in _secrets(secret)):
        return None
    attempt, number, texts, expires = facts.rsplit(".", 3)
    hook = Hook(kind, attempt, datetime.fromtimestamp(int(expires), UTC), int(number), texts == "1")  # pyright: ignore[reportArgumentType]
    return hook if now < hook.expires else None


def checked_secret(secret: SecretStr | str) -> str:
    """Return one or several secrets (separated by blanks) if each is long enough, else raise ConfigurationError."""
    keys = _secrets(secret)
    if (length := min(map(len, keys), default=0)) < SHORTEST_SECRET:
        raise ConfigurationError(
            f"The webhook secret has {length} characters; it needs at least {SHORTEST_SECRET}, since anybody with a "
            'URL can try to guess it. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return " ".join(keys)


def _secrets(secret: SecretStr | str) -> list[str]:
    return (secret.get_secret_value() if isinstance(secret, SecretStr) else secret).split()


def _signature(secret: str, kind: str, facts: str) -> str:
    message = f"prefect-crew webhook {kind} {facts}"
    digest = hmac.digest(secret.encode("utf-8", "surrogatepass"), message.encode("utf-8", "surrogatepass"), "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
