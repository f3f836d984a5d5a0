"""`prefect-crew docs`: the pages without a network."""

import re

import pytest

from prefect_crew.cli.docs import page_text, pages
from support.commands import Command


def test_the_list_names_pages_that_can_be_printed(here: Command):
    listed = dict(line.split(maxsplit=1) for line in here("docs").ok.splitlines())
    assert list(listed)[:2] == ["index", "tutorial"]
    assert listed["guides/recover"] == "Recover from crashes"
    assert "## 2. Start Prefect" in here("docs", "tutorial").ok
    # Some texts are made from the code.
    assert "KickoffUncertainError" in here("docs", "reference/exceptions").ok
    assert "| `PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS` |" in here("docs", "reference/settings").ok
    assert "| `seconds` |" in here("docs", "reference/dev-server").ok
    assert "prefect-crew runs resolve" in here("docs", "reference/cli").ok
    assert "## 0.1.0" in here("docs", "changelog").ok
    # A name that two pages share prints both.
    assert {"Run a batch", "Batches"} <= set(re.findall(r"^# (.*)$", here("docs", "batches").ok, re.MULTILINE))


@pytest.mark.parametrize("name", pages())
def test_a_page_is_whole_and_its_links_are_names_of_pages(name: str):
    text = page_text(name)
    assert not re.search(r"^(<!--|:::|\[\]\(\))", text, re.MULTILINE)
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)", prose)
    assert not [link for link in links if link not in pages()]


def test_the_reference_has_signatures_docstrings_and_fields():
    text = page_text("reference/python")
    assert "### arun_crew\n\n```python\narun_crew(crew: DeployedCrew | str, inputs: " in text
    assert "### crew_server\n" in text
    assert "| `max_attempts` | The most runs for one idempotency key" in text
    assert "#### CrewRun.astop\n" in text
