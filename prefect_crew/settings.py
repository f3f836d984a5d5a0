"""Settings of this package, read like Prefect's own: from the environment, a profile, or prefect.toml."""

from __future__ import annotations

from importlib.metadata import metadata
from typing import Annotated, Any, ClassVar

from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict


def documentation_url() -> str:
    """Return the address to which Prefect's pages link: the project's documentation, else CrewAI's page on the API."""
    addresses = dict(line.split(", ", 1) for line in metadata("prefect-crew").get_all("Project-URL") or ())
    return addresses.get("Documentation", "https://docs.crewai.com/en/api-reference/introduction")


class CrewSettings(PrefectBaseSettings):
    """`PREFECT_INTEGRATIONS_CREW_*`. Each use reads them again, so that a changed profile or environment counts."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "crew"))

    url: str | None = Field(default=None, description="The URL of the crew that `DeployedCrew.from_env()` returns.")
    token: SecretStr | None = Field(default=None, description="The bearer token of that crew.")
    database_url: SecretStr | None = Field(
        default=None,
        description="The crew database: postgresql://user:password@host/name for several machines, or "
        "sqlite:///path/crew.db. Default: crew.db beside Prefect's own SQLite file, for one machine.",
    )
    webhook_url: str | None = Field(
        default=None,
        description="The webhook receiver's public base URL. If it is set, every kickoff asks for webhooks.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="Secret that signs the webhooks' URLs, at least 32 characters. The receiver needs the same secret. "
        "Several are separated by blanks: the first signs, and the receiver accepts all.",
    )
    review_secret: SecretStr | None = Field(
        default=None,
        description="The signing secrets of Flows' review webhooks, as the platform shows them, separated by blanks. "
        "The receiver needs them, and so do flows with `review=`, which then wait for these webhooks.",
    )
    answer_url: str | None = Field(
        default=None,
        description="The receiver's base URL, as people reach it. If it is set, each question of a stored crew is sent "
        "with a link that answers it, by the block that `automations apply --notify` names.",
    )
    keep_records_days: int = Field(
        default=30,
        ge=1,
        description="Days for which a run is kept after its end. Until then its idempotency key starts no second run. "
        "Processes that end runs delete older ones.",
    )
    worker_modules: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Modules, in addition to this package's, whose flows a crew worker may import; separated by "
        "commas.",
    )

    @field_validator("worker_modules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
