"""Review by callback, as Flows ask for it: the signed webhook that asks, and the answer that goes to its callback URL.

The platform signs `{timestamp}.{body}` with a secret of the webhook's own. The callback URL holds a token of a single
use: whoever has it can answer, so it is shown nowhere, and no other token is sent to it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import ClassVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from prefect_crew.client._parsing import RUN_KEYS, as_id, as_list, as_object, as_text, decode, pick, values_at
from prefect_crew.client._transport import Call, Connections, is_loopback
from prefect_crew.client.models import ResumeAnswer
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import ConfigurationError, CrewAPIError, ResponseFormatError

MAX_AGE = 300.0
"""Seconds between a webhook's timestamp and now, in either direction."""
ANSWER_WITHIN = 30.0
"""Seconds for the whole answer of a callback URL."""
MOST_OPTIONS = 50
_YES = frozenset({"approve", "approved", "accept", "accepted", "yes", "ok"})
_NO = frozenset({"reject", "rejected", "decline", "declined", "deny", "denied", "no"})


class FeedbackRequest(BaseModel):
    """What a Flow asks of a person: `options` are the outcomes that it can go on with, none where any text will do."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    id: str
    kickoff_id: str
    task_id: str
    callback_url: SecretStr = Field(repr=False)
    message: str | None = Field(default=None, repr=False)
    output: str | None = Field(default=None, repr=False)
    options: tuple[str, ...] = ()
    assigned_to: str | None = None


def signed(secret: SecretStr, timestamp: str, signature: str, body: bytes, *, now: float) -> bool:
    """Return whether a webhook is signed with a secret, of which there may be several, separated by blanks.

    Every secret is compared with, in constant time, whatever the others say.
    """
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        return False
    if abs(now - int(timestamp)) > MAX_AGE:
        return False
    given = signature.strip().encode("utf-8", "surrogateescape")
    fits = False
    for one in secret.get_secret_value().split():
        digest = hmac.new(one.encode("utf-8", "surrogatepass"), timestamp.encode() + b"." + body, hashlib.sha256)
        fits |= hmac.compare_digest(given, b"sha256=" + digest.hexdigest().encode())
    return fits


def parse_request(body: bytes) -> FeedbackRequest | None:
    """Return what a webhook asks, None for one that asks nothing new.

    Raises ResponseFormatError where it names no run, or no callback URL that can be used.
    """
    expected = "a request for a person's feedback"
    value = decode(body, expected=expected)
    source = as_object(value)
    if pick(as_text, source, "event_type", "event", "type") not in ("new_request", "escalation"):
        return None
    kickoff_id = pick(as_id, source, *RUN_KEYS, "flow_execution_id", "flow_id")
    url = as_text(source.get("callback_url")) or ""
    id_ = pick(as_id, source, "id") or pick(as_text, source, "response_token")
    if kickoff_id is None or id_ is None or _read_url(url) is None:
        raise ResponseFormatError(expected=expected, body=f"the keys {', '.join(sorted(source)[:20])}")
    options = map(as_text, as_list(next(values_at(source, "emit_options", "emit"), None)))
    return FeedbackRequest(
        # The id alone: a response token would be a secret in a name.
        id=hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:32],
        kickoff_id=kickoff_id,
        task_id=pick(as_text, source, "method_name", "flow_class") or "review",
        callback_url=SecretStr(url),
        message=as_text(source.get("message")),
        output=as_text(source.get("output")),
        options=tuple(dict.fromkeys(filter(None, options)))[:MOST_OPTIONS],
        assigned_to=pick(as_text, source, "assigned_to_email", "assigned_to.email"),
    )


async def post_feedback(
    request: FeedbackRequest, feedback: str, *, source: str, allow_http: bool = False
) -> ResumeAnswer:
    """Answer a request at its callback URL, once. No token goes with it but the one in the URL.

    Raises:
        ConfigurationError: The URL cannot be called: nothing was sent.
        CrewAPIError, CrewConnectionError: As a call of `CrewClient`. `kickoff_fate` says what that means.
    """
    url = request.callback_url.get_secret_value()
    where = _read_url(url)
    if where is None:
        raise ConfigurationError(
            "The callback URL of the review is not an http or https URL. Answer on the Flow's page."
        )
    label = f"the callback at {where.host}"
    if where.scheme == "http" and not (allow_http or is_loopback(where.host)):
        raise ConfigurationError(
            f"{label.capitalize()} is plain http: the answer's token would cross the network in plain text. Answer on "
            "the Flow's page, or set allow_http if you trust the network."
        )
    content = json.dumps({"feedback": feedback, "source": source}).encode()
    call = Call("POST", "", request.kickoff_id, Redactor((url, *where.params.values())), content)
    connections = Connections(url, label=label, timeout=ANSWER_WITHIN / 2)  # a whole POST takes twice that
    del url, where, feedback, content  # error reporters show the local variables of all frames
    try:
        answer = await connections.exchange(call)
    finally:
        await connections.aclose()
    if not answer.is_success:
        body = call.shown(answer.text)
        raise CrewAPIError(
            status_code=answer.status, method="POST", path=label, body=body, kickoff_id=request.kickoff_id
        )
    return ResumeAnswer(kickoff_id=request.kickoff_id, status="accepted")


def _read_url(url: str) -> httpx.URL | None:
    """Return a URL that can be called, else None."""
    try:
        urlsplit(url)  # refuses an open bracket, which httpx takes for a part of the host's name
        found = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        return None
    return found if found.host and found.scheme in ("http", "https") else None


def approves(request: FeedbackRequest, option: str) -> bool:
    """Return whether an outcome approves: it is called so, or, where none is, is the first not called the contrary."""
    called_so = [one for one in request.options if one.casefold() in _YES]
    return option in (called_so or [one for one in request.options if one.casefold() not in _NO][:1])


def feedback_text(request: FeedbackRequest, *, approve: bool, feedback: str, option: str | None) -> str:
    """Return what is sent to a Flow: the outcome first, where it names some, then the words.

    Raises:
        ConfigurationError: The outcome is none of those that the Flow can go on with, or none is meant.
    """
    words = _YES if approve else _NO
    chosen = option or next((one for one in request.options if one.casefold() in words), None)
    if request.options and chosen not in request.options:
        raise ConfigurationError(
            f"The Flow continues with one of: {', '.join(request.options)}. Choose one (option=…, --option). "
            "Nothing was sent."
        )
    if not chosen and not feedback:
        chosen = "approved" if approve else "rejected"
    return ": ".join(part for part in (chosen, feedback) if part)
