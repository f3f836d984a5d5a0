"""Reviews by callback: a Flow's question comes by a signed webhook, and its answer goes to the callback URL in it.

The platform signs `{timestamp}.{body}` with the webhook's secret. The callback URL contains a token for a single use:
everybody who has the URL can answer. So nothing shows the URL, and requests to it contain no other token.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from prefect_crew._text import excerpt
from prefect_crew.client._parsing import RUN_KEYS, as_id, as_list, as_object, as_text, decode, pick, values_at
from prefect_crew.client._transport import Call, Connections, is_loopback, of_run, unreadable
from prefect_crew.client.models import ResumeAnswer, Review
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import ConfigurationError, CrewAPIError

MAX_AGE = 300.0
"""Seconds between a webhook's timestamp and now, in either direction."""
ANSWER_WITHIN = 30.0
"""Seconds for the whole answer of a callback URL."""
MOST_OPTIONS = 50
READ_BY_A_MODEL = (
    "Without feedback, the outcome alone is sent. With feedback, a model of the Flow reads the outcome from the text, "
    "and may read another one."
)
_YES = frozenset({"approve", "approved", "accept", "accepted", "yes", "ok"})
_NO = frozenset({"reject", "rejected", "decline", "declined", "deny", "denied", "no"})


@dataclass(frozen=True, kw_only=True)
class FlowQuestion:
    """A question of a Flow, with the URL for its answer. `id` is the same in each delivery of the question."""

    kickoff_id: str
    callback_url: SecretStr
    id: str = ""
    task_id: str = ""
    message: str | None = field(default=None, repr=False)
    output: str | None = field(default=None, repr=False)
    state: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    options: tuple[str, ...] = ()


def signed(secret: SecretStr, timestamp: str, signature: str, body: bytes, *, now: float) -> bool:
    """Return whether a webhook is signed with one of the secrets, which are separated by blanks.

    This always compares with every secret, in constant time.
    """
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        return False
    if abs(now - int(timestamp)) > MAX_AGE:
        return False
    mac = signature.strip().encode("utf-8", "surrogateescape")
    keys = [key.encode("utf-8", "surrogatepass") for key in secret.get_secret_value().split()]
    digests = [hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest() for key in keys]
    return sum(hmac.compare_digest(mac, b"sha256=" + digest.encode()) for digest in digests) > 0


def parse_question(body: bytes) -> FlowQuestion | None:
    """Return the question in a webhook, None if the webhook contains no new question.

    The webhook is flat, as AMP sends it, or has most of it under `request`, as documented.

    Raises:
        ResponseFormatError: The webhook names no run, or has no valid callback URL.
    """
    source = as_object(decode(body.decode("utf-8", "replace")))
    source |= as_object(source.get("request"))
    if source and pick(as_text, source, "event_type", "event", "type") not in ("new_request", "escalation"):
        return None
    kickoff_id = pick(as_id, source, *RUN_KEYS, "flow_execution_id", "flow_id")
    url = pick(as_text, source, "callback_url") or ""
    id_ = pick(as_id, source, "id") or pick(as_text, source, "response_token")
    if kickoff_id is None or id_ is None or not _is_url(url):
        keys = ", ".join(sorted(source)[:20])
        raise unreadable("a question to a person", f"the keys {keys}")
    options = map(as_text, as_list(next(values_at(source, "emit_options", "emit"), None)))
    return FlowQuestion(
        # A digest: the id may be a response token, which is a secret and must not be in a name.
        id=hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:32],
        kickoff_id=kickoff_id,
        task_id=pick(as_text, source, "method_name", "flow_class") or "review",
        callback_url=SecretStr(url),
        message=pick(as_text, source, "message"),
        output=pick(as_text, source, "output"),
        state=as_object(source.get("state")),
        options=tuple(dict.fromkeys(filter(None, options)))[:MOST_OPTIONS],
    )


async def post_answer(question: FlowQuestion, review: Review, *, allow_http: bool = False) -> ResumeAnswer:
    """Send an answer once, to the callback URL of a Flow's question. The request has no token but the URL's.

    Raises:
        ConfigurationError: The URL is plain http, or the Flow has no such outcome. Nothing was sent.
        CrewAPIError, CrewConnectionError: The errors of `CrewClient`. `kickoff_fate` returns their meaning.
    """
    url = httpx.URL(question.callback_url.get_secret_value())
    label = f"the callback at {url.host}"
    if url.scheme == "http" and not (allow_http or is_loopback(url.host)):
        raise ConfigurationError(
            f"{label.capitalize()} is plain http, so the answer's token would cross the network in plain text. Nothing "
            "was sent. Answer on the Flow's page on the CrewAI platform, or set allow_http if you trust the network."
        )
    content = json.dumps({"feedback": answer_text(question.options, review), "source": review.by}).encode()
    call = Call("POST", "", question.kickoff_id, Redactor((str(url), *url.params.values())), content)
    connections = Connections(str(url), label=label, timeout=ANSWER_WITHIN / 2)  # a whole POST takes twice that
    del url, content  # error reporters show the local variables of all frames
    try:
        answer = await connections.exchange(call)
    finally:
        await connections.aclose()
    if not httpx.codes.is_success(answer.status):
        body = call.shown(answer.text)
        raise CrewAPIError(
            f"POST {label} answered {answer.status}{of_run(question.kickoff_id)}: {excerpt(body) or 'an empty body'}. "
            "See the crew's page and the answer above.",
            status_code=answer.status,
            body=excerpt(body),
            kickoff_id=question.kickoff_id,
        )
    return ResumeAnswer(kickoff_id=question.kickoff_id, status="accepted")


def _is_url(url: str) -> bool:
    """Return whether a text is a valid http or https URL."""
    try:
        urlsplit(url)  # refuses an open bracket, which httpx accepts as a part of the host's name
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        return False
    return bool(address.host) and address.scheme in ("http", "https")


def approves(options: Sequence[str], option: str) -> bool:
    """Return whether an outcome approves, by its name. If no name approves, the first one that does not reject does."""
    approving = [name for name in options if name.casefold() in _YES]
    return option in (approving or [name for name in options if name.casefold() not in _NO][:1])


def answer_text(options: Sequence[str], review: Review) -> str:
    """Return the text for a Flow: the outcome, if the Flow names outcomes, then the feedback.

    From CrewAI 1.15.46 on, a Flow takes the outcome alone as it is. A model of the Flow reads any other text.

    Raises:
        ConfigurationError: The Flow does not have the outcome, or the answer selects none.
    """
    words = _YES if review.approve else _NO
    option = review.option or next((name for name in options if name.casefold() in words), None)
    if options and option not in options:
        raise ConfigurationError(
            f"The Flow has the outcomes {', '.join(options)}. Nothing was sent. Choose an outcome (option=…, --option)."
        )
    feedback = review.feedback.strip()
    if not option and not feedback:
        option = "approved" if review.approve else "rejected"
    return ": ".join(part for part in (option, feedback) if part)
