"""The webhook URLs of a run: their choice for a kickoff, their signature, and its verification. Sealed tokens.

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

from prefect_crew.client._transport import checked_url
from prefect_crew.client.webhooks import RUN_ENDS, BearerAuth, HumanInputWebhook, Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.records.model import RunRecord, claim_of, utcnow
from prefect_crew.settings import CrewSettings

if TYPE_CHECKING:
    from prefect_crew.crew import Crew, WaitPolicy

WebhookKind = Literal["task", "step", "crew", "human_input", "stream"]

VERSION = 2
"""The version of the payload. A receiver takes no other version."""
SHORTEST_SECRET = 32
"""Characters. An attacker who has one URL can try secrets against it on a machine of their own."""
MAX_TOKEN = 6144
"""Characters of a token. An idempotency key of 500 characters takes up to 2,700 of them, 4,000 if none is printable."""
LONGEST_NAME = 80
"""Characters of a crew's or a step's name that a token holds: up to 430 of its own."""
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
    """The purpose of a URL: one kind of webhook of one run, until `expires` (aware; whole seconds).

    `attempt` counts the attempts at the idempotency key. `claim` (from `claim_of`) distinguishes runs with the same key
    in two ledgers. `names`: whether events may contain the names of tasks and agents. `round` is the number of answers
    that the run had when we signed the URL. The receiver copies `crew`, `step` and `flow_run_id` into events.
    """

    kind: WebhookKind
    idempotency_key: str
    expires: datetime
    attempt: int | None = None
    names: bool = True
    round: int = 0
    claim: str | None = None
    crew: str | None = None
    step: str | None = None
    flow_run_id: str | None = None


def webhooks_for(
    crew: Crew,
    run: RunRecord | str,
    *,
    round: int = 0,  # noqa: A002 - the word of the domain
    settings: CrewSettings | None = None,
    wait: WaitPolicy | None = None,
) -> Webhooks | None:
    """Return the webhooks of one run by the settings, None if these switch no webhooks on.

    They are for its kickoff, and for each `/resume` again, the first of which answers question 1. `run` is the run's
    record, or its idempotency key if there is no record yet. `wait` is the run's policy, if it has one of its own: the
    URLs live as long as a wait by it. With an address of Prefect Cloud's own webhooks, all kinds go there and no secret
    is needed. Raises ConfigurationError if the address or the secret cannot be used.
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
    record, key = (None, run) if isinstance(run, str) else (run, run.idempotency_key)
    hook = Hook(
        "crew",
        key,
        hooks_expire(wait or crew.wait, utcnow()),
        None if record is None else record.attempt,
        # A name may repeat an input, and the receiver does not know the secret ones.
        names=crew.show != "none" and not crew.secret_inputs,
        round=round,
        claim=None if record is None else claim_of(record.owner),
        crew=crew.label[:LONGEST_NAME],
        step=None if record is None or record.step is None else record.step[:LONGEST_NAME],
        flow_run_id=None if record is None else record.flow_run_id,
    )
    return hook_urls(url, secret, hook)


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


def latest_webhooks_of(settings: CrewSettings) -> tuple[str, str] | None:
    """Return the URL at which a process that waits for runs asks for the latest webhooks, and the token for it.

    Return None if webhooks are off, or go to Prefect Cloud's own receiver, which has no such URL.
    """
    if not settings.webhook_url or settings.webhook_secret is None or is_prefect_cloud(settings.webhook_url):
        return None
    base = checked_url(settings.webhook_url, allow_http=True, what="The receiver's URL")
    return f"{base}/recent", recent_bearer(settings.webhook_secret)


# Signatures


def token_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the token of a hook's URL."""
    payload = _payload(hook)
    return f"{payload}.{_signature(_secrets(secret)[0], 'url', payload)}"


def bearer_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the bearer token that a stream webhook has to bring with its URL."""
    return _signature(_secrets(secret)[0], "bearer", _payload(hook))


def recent_bearer(secret: SecretStr | str) -> str:
    """Return the bearer token with which a process that waits for runs asks the receiver for the latest webhooks."""
    return _signature(_secrets(secret)[0], "recent", "")


def may_read_recent(secret: SecretStr | str, authorization: str | None) -> bool:
    """Return whether a request's Authorization header has that token of a secret; compared in constant time."""
    return any(_brings(authorization, recent_bearer(key)) for key in _secrets(secret))


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
    fields = {"version": VERSION, **fields, "expires": int(hook.expires.timestamp()), "round": hook.round % 256}
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


# Sealed values, in the links with which people answer


def seal(purpose: str, values: Sequence[Any], secret: SecretStr | str) -> str:
    """Return a token with JSON values, signed for one purpose, which is one word.

    It consists of small letters, digits and one dot in the middle, so that no chat program takes a part of it for
    formatting or for the end of the URL.
    """
    payload = _base32(_bytes(json.dumps(values, separators=(",", ":"))))
    return f"{payload}.{_base32(_mac(_secrets(secret)[0], purpose, payload))}"


def unseal(purpose: str, token: str, secret: SecretStr | str) -> tuple[list[Any], SecretStr] | None:
    """Return the values of a token and the secret that signed it, None if it is forged or was made for another purpose.

    This compares the signature, in constant time, before it reads anything from the token.
    """
    if len(token) > MAX_TOKEN:
        return None
    payload, _, signature = token.partition(".")
    for key in _secrets(secret):
        if _equal(signature, _base32(_mac(key, purpose, payload))):
            return json.loads(base64.b32decode(payload.upper() + "=" * (-len(payload) % 8))), SecretStr(key)
    return None


def fingerprint(secret: SecretStr | str, digest: str) -> str:
    """Return a keyed digest of a digest. Nobody without the secret can check a guess of the value behind it."""
    return _base32(_mac(_secrets(secret)[0], "fingerprint", digest))[:26]


def _base32(value: bytes) -> str:
    return base64.b32encode(value).rstrip(b"=").decode().lower()
