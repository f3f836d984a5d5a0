"""`prefect-crew automations`: set up, listed and removed, and refused before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret

from support.deployed import command
from support.prefect_server import PrefectServer

RECOVERY = ["prefect-crew: no heartbeat", "prefect-crew: recover"]
ALERTS = [f"prefect-crew: alert {what}" for what in ("asked", "problem", "waiting")]


@pytest.fixture
def pool(prefect_api: PrefectServer, here) -> Iterator[str]:
    command("prefect", "work-pool", "create", "recovery", "--type", "crew", "--overwrite", env=prefect_api.env())
    yield "recovery"
    here("automations", "delete", "--yes")
    command("prefect", "--no-prompt", "deployment", "delete", "recover/crashed", env=prefect_api.env())


@pytest.mark.programs
def test_they_are_set_up_listed_and_removed(here, pool: str):
    assert here("automations", "ls").out.startswith("There are no automations of this package")
    first = here("automations", "apply", "--pool", pool)
    assert first.code == 0
    assert "prefect-crew: recover\tcreated\tBegins a crashed flow run" in first.out
    assert "There are no alerts. Give --notify" in first.out

    block = CustomWebhookNotificationBlock(name="alerts", url="http://127.0.0.1:1")
    block.save("alerts-of-a-test", overwrite=True, _sync=True)
    notify = ("--notify", "custom-webhook/alerts-of-a-test")
    again = here("automations", "apply", *notify, "--waiting", "90m", "-o", "json").json
    changes = dict.fromkeys(RECOVERY, "updated") | dict.fromkeys(ALERTS, "created")
    assert {one["name"]: one["change"] for one in again} == changes
    assert next(one for one in again if one["name"] == ALERTS[-1])["description"].endswith("for 1:30:00.")
    kept = here("automations", "apply", "-o", "json").json
    assert {one["change"] for one in kept if one["name"] in ALERTS} == {"kept"}

    listed = here("automations", "ls", "-o", "json").json
    assert [one["name"] for one in listed] == sorted([*RECOVERY, *ALERTS])
    assert all(one["enabled"] and one["description"].endswith(".") for one in listed)

    asks = here("automations", "delete")
    assert (asks.code, asks.out, "--yes" in asks.err) == (2, "", True)
    removed = here("automations", "delete", "--yes").out
    assert removed.count("\tdeleted\t") == len(listed)
    assert "prefect deployment delete recover/crashed" in removed
    again = here("automations", "delete", "--yes")
    assert (again.code, again.out.startswith("There are no automations")) == (1, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("apply", "Recovery needs a work pool"),
        ("apply --pool nowhere", "There is no work pool nowhere"),
        ("apply --notify slack-webhook/nobody", "no block slack-webhook/nobody"),
        ("apply --notify secret/mute", "secret/mute cannot send notifications"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(here, prefect_api, line: str, said: str):
    Secret(value="x").save("mute", overwrite=True, _sync=True)  # type: ignore[arg-type]
    done = here("automations", *line.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert here("automations", "ls", "-o", "json").out.strip() == "[]"
