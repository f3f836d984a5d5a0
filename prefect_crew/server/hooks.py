"""Where a run's webhooks go: what `/kickoff` and `/resume` ask for.

The field names are those of the crew API: `taskWebhookUrl`, `stepWebhookUrl` and `crewWebhookUrl` carry no
authentication; `humanInputWebhook` is one target with authentication; `webhooks` is one event stream, or a list.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator

__all__ = ["Authentication", "Hooks", "HooksError", "Stream", "Target"]


class HooksError(ValueError):
    """The request's webhooks make no sense; the text says which one and why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Authentication(_Part):
    """How a webhook proves where it comes from: a bearer token, or a user name and password."""

    strategy: Literal["bearer", "basic"]
    token: SecretStr | None = None
    username: str | None = None
    password: SecretStr | None = None

    @model_validator(mode="after")
    def _complete(self) -> Authentication:
        if self.strategy == "bearer" and self.token is None:
            raise ValueError("a bearer strategy needs a token")
        if self.strategy == "basic" and (self.username is None or self.password is None):
            raise ValueError("a basic strategy needs a username and a password")
        return self


class Target(_Part):
    """One URL with its authentication, if it has any."""

    url: str = Field(pattern=r"^https?://", repr=False)
    authentication: Authentication | None = None


class Stream(Target):
    """One event stream. An empty `events` means all of them; `realtime` sends each by itself instead of in batches."""

    events: list[str] = Field(default_factory=list[str])
    realtime: bool = False


class Hooks(_Part):
    """All targets of one run. URLs stay out of the repr: what protects their receivers may stand in them."""

    task: str | None = Field(default=None, alias="taskWebhookUrl", pattern=r"^https?://", repr=False)
    step: str | None = Field(default=None, alias="stepWebhookUrl", pattern=r"^https?://", repr=False)
    crew: str | None = Field(default=None, alias="crewWebhookUrl", pattern=r"^https?://", repr=False)
    human: Target | None = Field(default=None, alias="humanInputWebhook")
    streams: list[Stream] = Field(default_factory=list[Stream], alias="webhooks")
    _asked: dict[str, Any] = PrivateAttr(default_factory=dict[str, Any])

    @classmethod
    def of(cls, body: dict[str, Any]) -> Hooks:
        """Read the webhooks of a `/kickoff` or `/resume` body.

        Raises:
            HooksError: A target is not an http(s) URL, or its authentication is incomplete.
        """
        fields = {name: body[name] for name in _FIELDS if body.get(name) not in (None, [])}
        if isinstance(fields.get("webhooks"), dict):
            fields["webhooks"] = [fields["webhooks"]]
        try:
            hooks = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise HooksError(f"{where}: {first['msg']}") from None
        hooks._asked = fields  # noqa: SLF001 - a model's private attribute can only be set once it exists
        return hooks

    def as_body(self) -> dict[str, Any]:
        """Return the fields as the request carried them, secrets in clear: for the journal only."""
        return dict(self._asked)


_FIELDS = ("taskWebhookUrl", "stepWebhookUrl", "crewWebhookUrl", "humanInputWebhook", "webhooks")
