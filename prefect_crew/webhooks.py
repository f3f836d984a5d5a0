"""The webhook URLs of a run: signed, verified, and which of them a kickoff asks for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, get_args
from urllib.parse import urlsplit

from pydantic import SecretStr

from prefect_crew.client._parsing import WebhookKind
from prefect_crew.client.webhooks import RUN_ENDS, BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.records.model import utcnow
from prefect_crew.settings import CrewSettings

if TYPE_CHECKING:
    from prefect_crew.crew import Crew, WaitPolicy


PLAIN_KINDS: tuple[WebhookKind, ...] = ("task", "step", "crew")
BEARER_KINDS: tuple[WebhookKind, ...] = ("human_input", "stream")
SHORTEST_SECRET = 32
"""Characters. Whoever has one URL can try secrets against it without asking anybody."""
MAX_TOKEN = 2048
"""Characters of a token: the longest idempotency key takes 1,743."""

_VERSION = 1
_HEAD = 11
_MAC = 32
_NAMES, _PACKED, _CLAIM = 1, 2, 4
_CLAIM_BYTES = 8
_CODE_POINTS = 0x110000
_MAX_EXPIRY = 2**40 - 1
_MAX_ATTEMPT = 2**24 - 1


@dataclass(frozen=True)
class Hook:
    """What a URL is for: one kind of webhook of one run, until `expires` (aware).

    `attempt` is the attempt at the idempotency key, None where the signer did not know it. `names`: whether the names
    of tasks
    and agents may stand in events. `round` is how many answers of people the run had when this was signed. `claim` is
    that of the attempt, as `claim_of` gives it: two records may have one idempotency key, such as those of two
    ledgers, or one
    that was deleted and another that took its place.
    """

    kind: WebhookKind
    idempotency_key: str
    expires: datetime
    attempt: int | None = None
    names: bool = True
    round: int = 0
    claim: str | None = None


def claim_of(owner: str) -> str:
    """Return what a URL says of the claim that it was made for."""
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[: 2 * _CLAIM_BYTES]


def hook_urls(
    base_url: str,
    secret: SecretStr | str,
    idempotency_key: str,
    *,
    expires: datetime,
    attempt: int | None = None,
    claim: str | None = None,
    names: bool = True,
    round: int = 0,  # noqa: A002 - the word of the domain
    kinds: Sequence[WebhookKind] = (*PLAIN_KINDS, "human_input"),
    stream_events: Sequence[str] = (),
    realtime: bool = False,
) -> Webhooks:
    """Return the webhooks of one run, for its kickoff and for each of its resumes. Equal arguments give equal URLs.

    Args:
        base_url: The receiver's public address; it may have a path, but neither query nor fragment.
        secret: What the receiver verifies with; at least 32 characters.
        idempotency_key: The run. It can be read from the URLs.
        expires: When the receiver stops to accept them; aware.
        attempt: Which attempt at the idempotency key, so that a late webhook of an earlier one is not taken for this
            one's.
        claim: Whose claim, so that no webhook of another's run resolves it; as `claim_of` gives it.
        names: Whether names of tasks and agents, which may repeat an input, may stand in Prefect's events.
        round: How many answers of people came before: each resume has URLs of its own, so that the same question asked
            again is not taken for a delivery that came twice.
        kinds: Which webhooks. "stream" is left out unless `stream_events` names some.
        stream_events, realtime: Types of CrewAI's events to be streamed, and whether each is sent at once.

    Raises:
        ConfigurationError: The address or the secret cannot be used, or `expires` is naive or out of range.
    """
    base, key = checked_base_url(base_url), checked_secret(secret)

    def hook(kind: WebhookKind) -> Hook:
        return Hook(kind, idempotency_key, expires, attempt, names, round, claim)

    def url(kind: WebhookKind) -> str | None:
        return f"{base}/hooks/{kind}/{token_of(hook(kind), key)}" if kind in kinds else None

    def bearer(kind: WebhookKind) -> BearerAuth:
        return BearerAuth(token=SecretStr(bearer_of(hook(kind), key)))

    human = url("human_input")
    streamed = f"{base}/hooks/stream/{token_of(hook('stream'), key)}" if stream_events else None
    return Webhooks(
        task=url("task"),
        step=url("step"),
        crew=url("crew"),
        human_input=HumanInputWebhook(url=human, authentication=bearer("human_input")) if human else None,
        stream=StreamWebhook(
            url=streamed, events=list(stream_events), realtime=realtime, authentication=bearer("stream")
        )
        if streamed
        else None,
    )


def token_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the token of a hook's URL.

    Raises:
        ConfigurationError: `expires` is naive, or a number is out of range.
    """
    payload = _payload(hook)
    return _text(payload + _mac(secret, b"url", hook.kind, payload))


def bearer_of(hook: Hook, secret: SecretStr | str) -> str:
    """Return the bearer token that a human-input or stream webhook has to bring beside its URL.

    Raises:
        ConfigurationError: As `token_of`.
    """
    return _text(_mac(secret, b"bearer", hook.kind, _payload(hook)))


def read_token(
    kind: str, token: str, secret: SecretStr | str, *, now: datetime, authorization: str | None = None
) -> Hook | None:
    """Return what a URL is for, None if it is not ours: forged, of another kind, stale, or without its bearer token.

    Args:
        kind: The kind in the URL.
        token: The token in the URL.
        secret: The receiver's.
        now: The time; aware.
        authorization: The request's Authorization header.

    The signature is compared in constant time and before anything else is read from the token.
    """
    if kind not in get_args(WebhookKind) or len(token) > MAX_TOKEN:
        return None
    sealed = _bytes(token)
    if sealed is None or len(sealed) <= _HEAD + _MAC:
        return None
    payload, mac = sealed[:-_MAC], sealed[-_MAC:]
    if not hmac.compare_digest(mac, _mac(secret, b"url", kind, payload)):
        return None
    hook = _read(kind, payload)  # pyright: ignore[reportArgumentType] - it is one of the kinds
    if hook is None or now >= hook.expires:
        return None
    if kind in BEARER_KINDS:
        scheme, _, given = (authorization or "").partition(" ")
        expected = _text(_mac(secret, b"bearer", kind, payload))
        matches = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), expected.encode())
        if not matches or scheme.lower() != "bearer":
            return None
    return hook


def checked_secret(secret: SecretStr | str) -> str:
    """Return a secret that is long enough.

    Raises:
        ConfigurationError: It is not.
    """
    text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    if len(text) < SHORTEST_SECRET:
        raise ConfigurationError(
            f"The webhook secret has {len(text)} characters; it needs {SHORTEST_SECRET} at least, since it can be "
            'guessed at from any URL. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return text


def checked_base_url(url: str) -> str:
    """Return the receiver's public address without a slash at its end.

    Raises:
        ConfigurationError: It is no http or https URL, or has credentials, a query or a fragment.
    """
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
    except ValueError:
        parts, host = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise ConfigurationError(
            "The webhook URL is no address of a receiver. It looks like https://hooks.example.com."
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            f"The webhook URL (host {host}) has credentials, a query or a fragment. Give the receiver's bare address."
        )
    return url.strip().rstrip("/")


def _mac(secret: SecretStr | str, purpose: bytes, kind: str, payload: bytes) -> bytes:
    text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    # No part but the last can hold a NUL, so no two sets of parts give the same message.
    message = b"\0".join((b"prefect-crew webhook", purpose, kind.encode(), payload))
    return hmac.digest(text.encode("utf-8", "surrogatepass"), message, "sha256")


def _payload(hook: Hook) -> bytes:
    if hook.expires.tzinfo is None:
        raise ConfigurationError("`expires` of a webhook has no time zone: give an aware datetime.")
    seconds, attempt = int(hook.expires.timestamp()), hook.attempt or 0
    if not (0 <= seconds <= _MAX_EXPIRY and 0 <= attempt <= _MAX_ATTEMPT and hook.idempotency_key):
        raise ConfigurationError("A webhook's idempotency key is empty, or its expiry or attempt is out of range.")
    form, key = _packed_key(hook.idempotency_key)
    flags = form | (_NAMES if hook.names else 0) | (_CLAIM if hook.claim else 0)
    claim = bytes.fromhex(hook.claim) if hook.claim else b""
    numbers = seconds.to_bytes(5, "big") + attempt.to_bytes(3, "big") + bytes((hook.round % 256,))
    return bytes((_VERSION, flags)) + numbers + claim + key


def _read(kind: WebhookKind, payload: bytes) -> Hook | None:
    """Return what signed bytes say; None for those of a version that is yet to come."""
    version, flags = payload[0], payload[1]
    if version != _VERSION:
        return None
    head = _HEAD + (_CLAIM_BYTES if flags & _CLAIM else 0)
    key = payload[head:]
    return Hook(
        kind=kind,
        idempotency_key=_unpacked(key) if flags & _PACKED else key.decode("utf-8"),
        expires=datetime.fromtimestamp(int.from_bytes(payload[2:7], "big"), UTC),
        attempt=int.from_bytes(payload[7:10], "big") or None,
        names=bool(flags & _NAMES),
        round=payload[10],
        claim=payload[_HEAD:head].hex() or None,
    )


def _packed_key(idempotency_key: str) -> tuple[int, bytes]:
    """Return an idempotency key's form and bytes, the shorter of two.

    As one number of 500 code points even the rarest characters take 1,256 bytes; UTF-8 would take 2,000, and the URL
    would be longer than servers on the way accept.
    """
    try:
        plain = idempotency_key.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        plain = None
    if plain is not None and len(plain) <= len(idempotency_key) * 2.6:
        return 0, plain
    number = 1  # so that leading NULs are kept
    for char in idempotency_key:
        number = number * _CODE_POINTS + ord(char)
    return _PACKED, number.to_bytes((number.bit_length() + 7) // 8, "big")


def _unpacked(key: bytes) -> str:
    number, chars = int.from_bytes(key, "big"), list[str]()
    while number > 1:
        number, code = divmod(number, _CODE_POINTS)
        chars.append(chr(code))
    return "".join(reversed(chars))


def _text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _bytes(text: str) -> bytes | None:
    """Return the bytes of a token, None where it is not the one text of those bytes."""
    try:
        value = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return None
    return value if hmac.compare_digest(_text(value), text) else None


CLOUD = "api.prefect.cloud"
MARGIN = 86_400.0
"""Seconds for which a webhook is still taken after all budgets of its run are spent."""
UNLIMITED = 30 * 86_400.0
"""Seconds that count for a budget without a limit."""


def webhooks_for(
    crew: Crew,
    idempotency_key: str,
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
        idempotency_key,
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
