"""What is secret in a batch stands in nothing that it writes, whatever way it came in and whoever repeats it."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew.batches.database import ledger_address
from prefect_crew.batches.dataset import shown_address
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.testing import CrewServerFactory
from support.batches import CREW, Batches, row_plan
from support.scripts import script

REPEATS = script(
    {"name": "pay", "output": "paid with {{ iban }}", "fail": "{{ 'no account ' + iban if 'bad' in topic }}"},
    inputs=["topic", "iban"],
)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("way", ["by name", "by type", "by a function of the row"])
async def test_no_file_of_a_batch_has_a_secret_input(way: str, batch: Batches, crew_server: CrewServerFactory):
    secret = f"iban-{uuid.uuid4().hex}"
    server = crew_server(REPEATS)
    crew = server.crew(secret_inputs=["iban"] if way == "by name" else [])
    value: Any = {"by name": lambda row: secret, "by type": SecretStr(secret)}.get(way, lambda row: SecretStr(secret))
    rows = [{"topic": "tea"}, {"topic": "bad"}]
    report = await batch(crew, rows, name=f"hidden {way}", key="topic", inputs={"topic": "topic", "iban": value})
    assert (report.completed, report.failed) == (1, 1)
    assert [run.inputs["iban"] for run in server.runs] == [secret, secret]
    lines = batch.lines()
    assert lines["tea"]["inputs"]["iban"] == MASK
    assert lines["tea"]["output"] == lines["tea"]["tasks"][0]["output"] == f"paid with {MASK}"
    assert lines["bad"]["error"] == f"no account {MASK}"
    assert secret.encode() not in everything_in(batch.folder)


async def test_files_of_a_batch_are_for_its_owner_only(batch: Batches, crew_server: CrewServerFactory):
    before = os.umask(0)
    try:
        for ending in ("jsonl", "jsonl.gz"):
            output = str(batch.folder / f"out.{ending}")
            await batch(crew_server(REPEATS).crew(), [{"topic": "tea", "iban": "x"}], output=output)
    finally:
        os.umask(before)
    found = {path.name: stat.filemode(path.stat().st_mode) for path in batch.folder.rglob("*") if path.is_file()}
    assert len(found) >= 4
    assert set(found.values()) == {"-rw-------"}, found


# Rows that cannot be run


def bad(rows: list[dict[str, Any]], **options: Any) -> list[str]:
    return [one.reason for one in row_plan(rows, crew=CREW.hiding(["pin"]), **options).check().bad]


def test_no_reason_of_a_bad_row_has_a_secret_input():
    def refuse(row: Any) -> Any:
        raise ValueError(f"who has {row['code']}?")

    rows = [{"topic": "tea", "code": "hunter22"}]
    for pin in (refuse, lambda row: refuse(row)):
        assert bad(rows, inputs={"topic": "topic", "pin": pin}) == [f"who has {MASK}?"]
    # The secret column of a template, refused where another input is made.
    assert bad(rows, inputs={"pin": "{{ code }}", "topic": refuse}) == [f"who has {MASK}?"]
    assert bad(rows, inputs=refuse) == [f"who has {MASK}?"]
    assert bad(
        [{"code": SecretStr("hunter22")}], inputs=lambda row: refuse({"code": row["code"].get_secret_value()})
    ) == [f"who has {MASK}?"]


def test_a_key_that_holds_a_secret_input_is_refused():
    rows = [{"topic": "tea", "code": "hunter22"}]
    assert bad(rows, inputs={"topic": "topic", "pin": "code"}, key=lambda row: f"of {row['code']}") == [
        "its key holds a secret input, and keys are shown in logs, artifacts and the ledger"
    ]
    given = row_plan(rows, inputs={"pin": lambda row: SecretStr(row["code"])}, key="code")
    assert list(given.jobs()) == []


# Addresses


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://u:pw@h.test/x.csv?sig=pw#pw", "https://h.test/x.csv"),
        ("simplecache::https://u:pw@h.test/x.csv", "simplecache::https://h.test/x.csv"),
        ("zip://x.csv::s3://k:pw@bucket/a.zip?pw", "zip://x.csv::s3://bucket/a.zip"),
        ("filecache::sftp://u:pw@h.test/x.csv", "filecache::sftp://h.test/x.csv"),
        ("/data/x.csv", "/data/x.csv"),
    ],
)
def test_an_address_is_shown_without_what_is_secret(address: str, shown: str):
    assert shown_address(address) == shown


@pytest.mark.parametrize(
    "ledger",
    [
        "postgresql://u:pa55word@h/db",
        "postgresql://u@h/db?password=pa55word",
        "postgresql://u@h/db?sslpassword=pa55word&sslmode=require",
        "postgresql://u@h/db?passfile=pa55word",
        "postgresql://u@h/db?options=-c%20my.secret%3Dpa55word",
        "postgresql://u@h/db?user=u&Password=pa55word",
    ],
)
async def test_the_password_of_a_ledger_is_shown_nowhere(ledger: str):
    place = await ledger_address(ledger, "out.jsonl")
    assert place.public in ("postgresql://u@h/db", "postgresql://u:***@h/db")
    assert "pa55word" not in repr(place)


async def test_a_ledger_without_a_password_keeps_its_options():
    place = await ledger_address("postgresql://u@h/db?sslmode=require", "out.jsonl")
    assert place.public == "postgresql://u@h/db?sslmode=require"


async def test_an_address_of_a_ledger_that_cannot_be_read_is_not_shown():
    with pytest.raises(ConfigurationError) as raised:
        await ledger_address("mysql://u:pa55word@h/db", "out.jsonl")
    assert "pa55word" not in str(raised.value)
