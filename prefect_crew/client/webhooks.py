"""The webhooks that a kickoff and a resume ask the crew's server to call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from prefect_crew.client.encoding import encode_inputs

RUN_ENDS = ("crew_kickoff_completed", "crew_kickoff_failed", "flow_finished", "method_execution_failed")
"""Events of a stream after which a run may have ended. No plain webhook reports a failure. Crews and Flows send
different events of these, in no certain order, and some before the end."""


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a webhook's URL starts with http:// or https:// and names a host")
    return url


Url = Annotated[str, AfterValidator(_check_url)]


class _Model(BaseModel):
    # A URL may carry the only secret that protects its receiver: no error and no repr shows more than its host.
    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True
    )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            if isinstance(value, str) and "://" in value:
                parts = urlsplit(value)
                value = f"{parts.scheme}://{parts.hostname}/…"
            yield name, value


class BearerAuth(_Model):
    """A bearer token that the crew's server sends to the webhook."""

    strategy: Literal["bearer"] = "bearer"
    token: SecretStr


class BasicAuth(_Model):
    """A name and a password that the crew's server sends to the webhook."""

    strategy: Literal["basic"] = "basic"
    username: str
    password: SecretStr


class HumanInputWebhook(_Model):
    """The target for the report that a run waits for a person."""

    url: Url
    authentication: BearerAuth | BasicAuth | None = None


class StreamWebhook(_Model):
    """The target for the events named in `events`: at once (`realtime`) or in groups, in no certain order."""

    url: Url
    events: list[str] = Field(min_length=1)
    realtime: bool = False
    authentication: BearerAuth | BasicAuth | None = None


class Webhooks(_Model):
    """The targets of one run.

    `task`, `step` and `crew` are URLs. The API has no authentication for these three: only a secret in a URL protects
    its receiver.
    """

    task: Url | None = Field(default=None, serialization_alias="taskWebhookUrl")
    step: Url | None = Field(default=None, serialization_alias="stepWebhookUrl")
    crew: Url | None = Field(default=None, serialization_alias="crewWebhookUrl")
    human_input: HumanInputWebhook | Url | None = Field(default=None, serialization_alias="humanInputWebhook")
    stream: StreamWebhook | None = Field(default=None, serialization_alias="webhooks")

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Webhooks:
        """Return the targets in the body of a kickoff or a resume. Raises a ValidationError for an invalid target."""
        keys = {name: str(info.serialization_alias) for name, info in cls.model_fields.items()}
        return cls.model_validate({name: body[key] for name, key in keys.items() if key in body})

    def to_json(self) -> dict[str, Any]:
        """Return the keys of these targets in the body of a kickoff or a resume, with their secrets.

        The human-input webhook has both of its names: the documented one, and that of hosted crews, a plain URL.
        """
        body = self.model_dump(by_alias=True, exclude_none=True)
        if (human := self.human_input) is not None:
            url = human if isinstance(human, str) else human.url
            body |= {"humanInputWebhookUrl": url}
            if isinstance(human, str):
                body["humanInputWebhook"] = {"url": url}
        return encode_inputs(body, as_json=True)

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
