"""The targets that a crew's server is asked to call, as a kickoff and a resume send them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

RUN_ENDS = ("crew_kickoff_completed", "crew_kickoff_failed", "flow_finished", "method_execution_failed")
"""Events of a stream after which a run may have ended: no plain webhook tells of a failure, and which of these a server
sends differs between crews and Flows. They come in no certain order, and some before the end."""


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a webhook's URL starts with http:// or https:// and names a host")
    return url


Url = Annotated[str, AfterValidator(_check_url)]


class _Model(BaseModel):
    # A URL may carry the only secret that protects its receiver: no error and no repr shows more than its host.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _host(value) if isinstance(value, str) and "://" in value else value


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/…"


class BearerAuth(_Model):
    """A bearer token that the crew's server sends to the webhook."""

    token: SecretStr

    def to_json(self) -> dict[str, str]:
        """Return the `authentication` object of the API, with the secret in it."""
        return {"strategy": "bearer", "token": self.token.get_secret_value()}


class BasicAuth(_Model):
    """A name and a password that the crew's server sends to the webhook."""

    username: str
    password: SecretStr

    def to_json(self) -> dict[str, str]:
        """Return the `authentication` object of the API, with the secret in it."""
        return {"strategy": "basic", "username": self.username, "password": self.password.get_secret_value()}


class HumanInputWebhook(_Model):
    """Where the server says that a run waits for a person."""

    url: Url
    authentication: BearerAuth | BasicAuth | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the `humanInputWebhook` object of the API."""
        return _target(self.url, self.authentication)


class StreamWebhook(_Model):
    """Where the server sends the events named in `events`, at once (`realtime`) or gathered, in no certain order."""

    url: Url
    events: list[str] = Field(min_length=1)
    realtime: bool = False
    authentication: BearerAuth | BasicAuth | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the `webhooks` object of the API."""
        return {"events": list(self.events), "realtime": self.realtime, **_target(self.url, self.authentication)}


def _target(url: str, authentication: BearerAuth | BasicAuth | None) -> dict[str, Any]:
    return {"url": url} if authentication is None else {"url": url, "authentication": authentication.to_json()}


class Webhooks(_Model):
    """The targets of one run.

    `task`, `step` and `crew` are URLs. The API knows no authentication for those three: what stands in the URL is all
    that protects the receiver.
    """

    task: Url | None = None
    step: Url | None = None
    crew: Url | None = None
    human_input: HumanInputWebhook | Url | None = None
    stream: StreamWebhook | None = None

    def for_kickoff(self) -> dict[str, Any]:
        """Return the keys that a kickoff's body carries for these targets, secrets included. Empty without targets."""
        human = HumanInputWebhook(url=self.human_input) if isinstance(self.human_input, str) else self.human_input
        body = {
            "taskWebhookUrl": self.task,
            "stepWebhookUrl": self.step,
            "crewWebhookUrl": self.crew,
            "humanInputWebhook": human.to_json() if human else None,
            "webhooks": self.stream.to_json() if self.stream else None,
        }
        return {key: value for key, value in body.items() if value is not None}

    def for_resume(self) -> dict[str, Any]:
        """Return the keys that a resume's body carries: all of them again, since the server carries none over."""
        return self.for_kickoff()

    def secrets(self) -> list[str]:
        """Return every text in these targets that must not be shown: tokens, passwords, and the URLs themselves."""
        return list(_secrets(self))


def _secrets(value: Any) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _secrets(getattr(value, name))
    elif isinstance(value, str) and "://" in value:
        yield value
