"""The webhook URLs of a run: their choice for a kickoff, their signature, and its verification.

    {receiver}/hooks/{kind}/{payload}.{signature}

The payload is JSON in base64 that names the URL's run; the signature is an HMAC of the payload. Everybody who has a URL
can send webhooks of one kind about one run, until it expires.

The setting may hold several secrets, separated by blanks, so that it can be changed while runs are in flight: the first
secret signs, and a signature of any of them is accepted.
"""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from prefect_crew._internal.clock import utcnow
from prefect_crew.client._transport import checked_url
from prefect_crew.client.webhooks import RUN_ENDS, BearerAuth, HumanInputWebhook, Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.settings import CrewSettings
from prefect_crew.store.decision import Attempt

if TYPE_CHECKING:
    from prefect_crew.crew import Crew, WaitPolicy

WebhookKind = Literal["task", "step", "crew", "human_input", "stream"]

VERSION = 3
"""The version of the payload. A receiver takes no other version."""
SHORTEST_SECRET = 32
"""Characters. An attacker who has one URL can try secrets against it on a machine of their own."""
MAX_TOKEN = 500
"""Characters of a token: most have 200."""
BEARER_KINDS: tuple[WebhookKind, ...] = ("stream",)
"""The kinds for which crews send a bearer token, and so have to. Hosted crews send none for human input."""
ASKED = "crew.webhook.human_input"
COMPLETED = "crew.webhook.crew"
WAKING = (COMPLETED, ASKED, *(f"crew.webhook.stream.{kind}" for kind in RUN_ENDS))
"""The events about webhooks that end a pause: an end, a wait for a person. Tasks and steps do not: each would cost a
status call."""
REPORTED = frozenset(WAKING) - {"crew.webhook.stream.crew_kickoff_completed"}
"""Webhooks that become Prefect events. A crew that completed is reported by its crew webhook; the stream says it once
more, and of each crew of a Flow."""
CLOUD = "api.prefect.cloud"
EXPIRY_MARGIN = 86_400.0
"""Seconds for which a webhook is still taken after all budgets of its run are spent."""
UNLIMITED = 30 * 86_400.0
"""Seconds that count for a budget without a limit."""


@dataclass(frozen=True)
class Hook:
    """The purpose of a URL: one kind of webhook of one attempt, until `expires` (aware; whole seconds).

    `attempt` is its id in the crew database. `round` is the number of answers that the run had when we signed the URL.
    `names`: whether events may contain the names of tasks and agents. `texts`: whether the crew database may contain
    the text of a question.
    """

    kind: WebhookKind
    attempt: str
    expires: datetime
    round: int = 0
    names: bool = True
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
    policy, if it has one of its own: the URLs live as long as a wait by it. With an address of Prefect Cloud's own
    webhooks, all kinds go there and no secret is needed. Raises ConfigurationError if the address or the secret cannot
    be used.
    """
    settings = settings or CrewSettings()
    url, secret = settings.webhook_url, settings.webhook_secret
    if not url:
        return None
    if is_prefect_cloud(url):
        return Webhooks(task=url, step=url, crew=url, human_input=HumanInputWebhook(url=url))
    if secret is None:
        raise ConfigurationError(
            "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL is set without PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET. Set the "
            "receiver's secret, or unset the URL. Then polling alone finds out that runs have ended."
        )
    # A name may repeat an input, and the receiver does not know the secret ones.
    names = crew.show != "none" and not crew.secret_inputs
    texts = crew.show == "full" and not crew.secret_inputs
    expires = hooks_expire(wait or crew.wait, utcnow())
    return hook_urls(url, secret, Hook("crew", attempt.id, expires, round, names, texts))


def is_prefect_cloud(url: str) -> bool:
    """Return whether webhooks go to Prefect Cloud's own receiver."""
    parts = urlsplit(url.strip())
    return parts.scheme == "https" and parts.hostname == CLOUD and parts.path.startswith("/hooks/")


def hooks_expire(wait: WaitPolicy, now: datetime) -> datetime:
    """Return the end of the time for a run's webhooks: the longest time of a wait for the run, and a day more."""
    budgets = (wait.timeout, wait.human_timeout)
    return now + timedelta(seconds=sum(UNLIMITED if budget is None else budget for budget in budgets) + EXPIRY_MARGIN)


def hook_urls(base_url: str, secret: SecretStr | str, run: Hook, stream_events: Sequence[str] = RUN_ENDS) -> Webhooks:
    """Return the webhooks of one run, for its kickoff and for each of its resumes. Equal arguments give equal URLs.

    Args:
        base_url: The receiver's public address; it may have a path, but neither query nor fragment.
        secret: The receiver's secret. If the text holds several secrets, the first one signs the URLs.
        run: The facts about the run, with any `kind`. Everybody who has a URL can read these facts.
        stream_events: Types of CrewAI's events that are sent one by one.

    Raises:
        ConfigurationError: The address or the secret cannot be used.
    """
    base = checked_url(base_url, allow_http=True, what="The receiver's URL")
    key = checked_secret(secret)

    def signed(kind: WebhookKind) -> dict[str, Any]:
        hook = replace(run, kind=kind)
        bearer = {"authentication": BearerAuth(token=SecretStr(bearer_of(hook, key)))} if kind in BEARER_KINDS else {}
        return {"url": f"{base}/hooks/{kind}/{token_of(hook, key)}", **bearer}

    plain = {kind: signed(kind)["url"] for kind in ("task", "step", "crew")}
    stream = {**signed("stream"), "events": list(stream_events), "realtime": True}
    return Webhooks.model_validate({**plain, "human_input": signed("human_input"), "stream": stream})


# Signatures


def token_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the token of a hook's URL."""
    payload = _payload(hook)
    return f"{payload}.{_signature(_secrets(secret)[0], 'url', payload)}"


def bearer_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the bearer token that a stream webhook has to bring with its URL."""
    return _signature(_secrets(secret)[0], "bearer", _payload(hook))


def read_token(
    kind: str, token: str, secret: SecretStr | str, *, now: datetime, authorization: str | None = None
) -> Hook | None:
    """Return the purpose of a URL, None if it is forged, of another kind, stale, or without its bearer token.

    This compares the signature, in constant time, before it reads anything from the token. `kind` and `token` are those
    of the URL, `authorization` is the header; of several secrets any may have signed.
    """
    if len(token) > MAX_TOKEN:
        return None
    payload, _, signature = token.partition(".")
    signers = [key for key in _secrets(secret) if _equal(signature, _signature(key, "url", payload))]
    if not signers:
        return None
    fields: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    if fields.pop("version", None) != VERSION or fields["kind"] != kind:
        return None
    fields["expires"] = datetime.fromtimestamp(fields["expires"], UTC)
    hook = Hook(**fields)
    needs_bearer = kind in BEARER_KINDS
    if now >= hook.expires or (needs_bearer and not _brings(authorization, _signature(signers[0], "bearer", payload))):
        return None
    return hook


def checked_secret(secret: SecretStr | str) -> str:
    """Return one or several secrets (separated by blanks) if each is long enough, else raise ConfigurationError."""
    keys = _secrets(secret)
    if (length := min(map(len, keys))) < SHORTEST_SECRET:
        raise ConfigurationError(
            f"The webhook secret has {length} characters; it needs at least {SHORTEST_SECRET}, since anybody with a "
            'URL can try to guess it. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return " ".join(keys)


def _payload(hook: Hook) -> str:
    fields = {name: value for name, value in asdict(hook).items() if value is not None}
    fields = {"version": VERSION, **fields, "expires": int(hook.expires.timestamp())}
    return _base64(_bytes(json.dumps(fields, ensure_ascii=False, separators=(",", ":"))))


def _secrets(secret: SecretStr | str) -> list[str]:
    """Return the secrets in a text, separated by blanks, or the whole text if no part is long enough by itself."""
    text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    parts = text.split()
    return parts if len(parts) > 1 and max(map(len, parts)) >= SHORTEST_SECRET else [text]


def _signature(secret: str, purpose: str, payload: str) -> str:
    return _base64(_mac(secret, purpose, payload))


def _mac(secret: str, purpose: str, payload: str) -> bytes:
    message = f"prefect-crew webhook {purpose} {payload}"  # no blank is in any of them
    return hmac.digest(_bytes(secret), _bytes(message), "sha256")


def _brings(authorization: str | None, token: str) -> bool:
    scheme, _, bearer = (authorization or "").partition(" ")
    return _equal(bearer.strip(), token) and scheme.lower() == "bearer"


def _equal(text: str, other: str) -> bool:
    return hmac.compare_digest(_bytes(text), _bytes(other))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
