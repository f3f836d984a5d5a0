"""Answer links: a signed URL for each question, and the notification that brings the URL to people who have no Prefect.

    {receiver}/answer/{payload}.{signature}

Anybody who has the URL can answer the question while it is open. The first answer counts. So the URL stands in the
notification alone: in no event, log, artifact or Variable. The notification has no text of the crew, since chat
programs make links, mentions and formatting of text.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from prefect_crew._internal.asyncio_tasks import call_in_thread
from prefect_crew._internal.prefect_api import lock_here
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, prefect_error
from prefect_crew.client._transport import checked_url
from prefect_crew.client.models import ReviewRequest
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import utcnow
from prefect_crew.runs.reviews.questions import digest, may_be_same, place_of
from prefect_crew.settings import CrewSettings
from prefect_crew.webhooks import UNLIMITED, checked_secret, fingerprint, seal, unseal

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun

ASKED_ALERT = "prefect-crew: alert asked"
"""The automation (automations.py) whose block sends the links. Its own alert goes out for questions without a link."""
NOTIFY_WITHIN = 20.0  # seconds to load the block and to send one notification
QUEUED_WITHIN = 300.0  # seconds for the notifications before it, and for itself
MAX_LINK = 1500
"""Characters of a token. Most have 230; the kickoff id, a text of the crew's server, may be long."""
_WORDS = re.compile(r"[^\W_](?:[\w /-]{0,78}[^\W_])?")
"""Names that a notification shows. Without dots, signs and colons they are no link, mention or formatting."""
_SENDERS = ("apprise", "httpx", "urllib3", "slack_sdk")
"""Libraries whose loggers may write the body of a notification, or a URL with it, at the level DEBUG or INFO."""


@dataclass(frozen=True)
class AnswerLink:
    """The question that a link is for.

    `number` is the number of its answer among all answers of the run. `place` and `output` are keyed digests of the
    facts by which `is_same_question` distinguishes questions; `output` is None if the status showed none.
    """

    kickoff_id: str
    number: int
    expires: datetime
    place: str
    output: str | None

    @classmethod
    def of(cls, question: ReviewRequest, expires: datetime, secret: SecretStr) -> AnswerLink:
        """Return the link for a question, with the digests keyed by a secret."""
        output = question.output_digest
        return cls(
            question.kickoff_id,
            len(question.answers) + 1,
            expires.replace(microsecond=0),
            fingerprint(secret, digest(question.kickoff_id, *place_of(question))),
            None if output is None else fingerprint(secret, output),
        )

    def token(self, secret: SecretStr) -> str:
        """Return the signed token for the URL."""
        expires = int(self.expires.timestamp())
        return seal("answer", [self.kickoff_id, self.number, expires, self.place, self.output], secret)


def read_link(token: str, secret: SecretStr) -> tuple[AnswerLink, SecretStr] | None:
    """Return a token's link and which secret signed it, None if it is forged, expired or no answer link."""
    unsealed = None if len(token) > MAX_LINK else unseal("answer", token, secret)
    if unsealed is None:
        return None
    (kickoff_id, number, expires, place, output), signer = unsealed
    link = AnswerLink(kickoff_id, number, datetime.fromtimestamp(expires, UTC), place, output)
    return None if utcnow() >= link.expires else (link, signer)


def is_about(link: AnswerLink, question: ReviewRequest, signer: SecretStr) -> bool:
    """Return whether a link is for this question; the status may show more or less of it by now."""
    other = AnswerLink.of(question, link.expires, signer)
    return link.place == other.place and may_be_same(link.output, other.output)


# The notification


async def notify_people(run: LiveRun, question: ReviewRequest, policy: WaitPolicy) -> None:
    """Send people the link for a question by the stored block; send none if a person has disabled its automation.

    The link ends with the `human_timeout` of `policy`. One notification is sent at a time in each event loop.

    Raises:
        CrewError: It was not sent, or not in time. The message has the reason, without the link and the block's texts.
    """
    settings = CrewSettings()
    if settings.answer_url is None or settings.webhook_secret is None:
        raise ConfigurationError("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET, the receiver's secret, is not set")
    if run.crew.block is None:
        raise ConfigurationError("the crew is no stored block, so the receiver has no token for it")
    secret, expires = SecretStr(checked_secret(settings.webhook_secret)), utcnow()
    expires += timedelta(seconds=policy.human_timeout or UNLIMITED)
    token = AnswerLink.of(question, expires, secret).token(secret)
    if len(token) > MAX_LINK:
        raise ConfigurationError("the kickoff id is too long for a link")
    base = checked_url(settings.answer_url, allow_http=True, what="PREFECT_INTEGRATIONS_CREW_ANSWER_URL")
    subject, body = describe_link(run, question, f"{base}/answer/{token}", expires)
    sender, within = "the notifications before it", QUEUED_WITHIN
    try:
        async with asyncio.timeout(within), lock_here("notifications"):
            sender, within = "the Prefect API", NOTIFY_WITHIN
            async with asyncio.timeout(within):
                block = await _load_block()
                if block is None:
                    return
                sender = f"the block {block.get_block_type_slug()}"
                # A block may be sync, and Prefect calls one so in a sync flow: here it would hold up all polls.
                await call_in_thread(asyncio.run, _notify(block, subject, body, token))
    except TimeoutError:
        raise CrewError(f"{sender} took more than {within:g} s") from None
    except CrewError:
        raise
    except Exception as error:  # noqa: BLE001  a block may raise anything
        # The texts of the block's errors may have the link, or the address of the chat.
        raise CrewError(f"{sender} raised {type(error).__name__}") from None


def describe_link(run: LiveRun, question: ReviewRequest, url: str, expires: datetime) -> tuple[str, str]:
    """Return the subject and the body of the notification about a question."""
    names = {"task": "" if run.show == "none" else run.redact_name(question.task_id), "run": run.idempotency_key or ""}
    facts = [f"{kind} {name}" for kind, name in names.items() if _WORDS.fullmatch(name)]
    return f"Crew {run.crew.label} asks a person", (
        f"{', '.join([f'Crew {run.crew.label} waits for an answer', *facts, f'question {question.round}'])}.\n\n"
        f"Read it and answer:\n{url}\n\n"
        f"Anybody who has this link can answer, until {expires:%Y-%m-%d %H:%M} UTC. The first answer counts."
    )


async def _load_block() -> Block | None:
    """Return the block that `automations apply --notify` has named, None if a person has disabled its automation.

    Raises:
        CrewError: There is no such automation, or the Prefect API does not answer or refuses.
    """
    import_module("prefect.blocks.notifications")  # so that Prefect finds the classes of its own blocks
    try:
        async with get_client() as client:
            automations = await client.read_automations_by_name(ASKED_ALERT)
        if not automations:
            raise ConfigurationError("no block is named for links: prefect-crew automations apply --notify TYPE/NAME")
        if not automations[0].enabled:
            return None
        action: Any = automations[0].actions[0]
        return await Block.aload_from_ref(action.block_document_id)
    except PREFECT_ERRORS as error:
        raise prefect_error(error, "The block cannot be loaded.") from None


async def _notify(block: Any, subject: str, body: str, token: str) -> None:
    with _unlogged(token), block.raise_on_failure():
        # By Prefect's context, a block's method returns a coroutine or does its work at once.
        sending = block.notify(body=body, subject=subject)
        if inspect.isawaitable(sending):
            await sending


@contextmanager
def _unlogged(token: str) -> Generator[None]:
    """Drop the lines with a token from the logs of libraries that send notifications."""

    def has_no_token(line: logging.LogRecord) -> bool:
        return token not in line.getMessage()

    with ExitStack() as stack:
        # The filter of a logger is not one of the loggers below it.
        for name in {*_SENDERS, *(name for name in [*logging.root.manager.loggerDict] if name.startswith(_SENDERS))}:
            logger = logging.getLogger(name)
            logger.addFilter(has_no_token)
            stack.callback(logger.removeFilter, has_no_token)
        yield
