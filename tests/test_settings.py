"""Settings are Prefect's: from the environment, a profile, or prefect.toml."""

from email.message import Message
from pathlib import Path

import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew, settings
from prefect_crew.settings import CrewSettings


def test_the_environment_counts_at_each_use_and_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch):
    assert CrewSettings().url is None
    assert CrewSettings().token is None
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_URL", "https://travel.test")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_TOKEN", "the-token")
    read = CrewSettings()
    assert read.url == "https://travel.test"
    assert read.token == SecretStr("the-token")
    assert "the-token" not in repr(read) + read.model_dump_json()


def test_a_prefect_toml_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "prefect.toml").write_text('[integrations.crew]\nurl = "https://from.toml.test"\n')
    monkeypatch.chdir(tmp_path)
    assert CrewSettings().url == "https://from.toml.test"


# What stands in the environment, as a crew


def test_other_names_are_other_crews_and_no_token_is_sent_to_another_crew(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"Set NEWS_URL and NEWS_TOKEN .* or PREFECT_INTEGRATIONS_CREW_URL"):
        DeployedCrew.from_env("NEWS")
    monkeypatch.setenv("NEWS_URL", "https://news.test/")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_URL", "https://travel.test")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_TOKEN", "of-travel")
    with pytest.raises(ValueError, match=r"no token for https://news\.test/\. Set NEWS_TOKEN"):
        DeployedCrew.from_env("NEWS")
    monkeypatch.setenv("NEWS_TOKEN", "of-the-news")
    news = DeployedCrew.from_env("NEWS", max_attempts=1)
    assert news.url == "https://news.test"
    assert news.token.get_secret_value() == "of-the-news"
    assert news.max_attempts == 1
    assert DeployedCrew.from_env().token.get_secret_value() == "of-travel"
    monkeypatch.delenv("NEWS_URL")
    assert DeployedCrew.from_env("NEWS").token.get_secret_value() == "of-travel"


def test_pages_of_prefect_link_the_address_of_the_project_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    project = Message()
    monkeypatch.setattr(settings, "metadata", lambda _: project)
    assert settings.documentation_url().startswith("https://docs.crewai.com/")
    project["Project-URL"] = "Issues, https://example.com/me/it/issues"
    project["Project-URL"] = "Documentation, https://example.com/me/it/docs"
    assert settings.documentation_url() == "https://example.com/me/it/docs"
