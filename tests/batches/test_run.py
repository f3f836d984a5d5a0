"""`run_batch` on a real Prefect server and a real crew server: rows in, lines out, and a second call that goes on."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import stat
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.context import FlowRunContext
from pydantic import BaseModel, Field, SecretStr, field_serializer, field_validator, model_validator

from prefect_crew import BatchFailedError, BatchReport, arun_batch, plan_batch, run_batch
from prefect_crew.batches.attempts import Write
from prefect_crew.batches.database import GroupWriter
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.outcomes import MISFIT_WITHOUT_REASONS, RowState
from prefect_crew.batches.rows import RowPlan
from prefect_crew.batches.stored import open_stored_batch
from prefect_crew.client._client import CrewClient
from prefect_crew.client.redaction import MASK
from prefect_crew.devserver._scripts import load_program
from prefect_crew.exceptions import (
    BadRowsError,
    BatchBusyError,
    BatchChangedError,
    ConfigurationError,
    CrewConnectionError,
    ExportError,
    LedgerMissingError,
    RateLimitedError,
    ServerError,
)
from prefect_crew.runs.run import WITHHELD
from prefect_crew.testing import CrewServerFactory
from support.batches import CREW, Batches, attempts_read_in_scans, topics
from support.held import Held
from support.scripts import PICKY, script, slow
from support.waiting import until

ECHO = script({"output": "on {{ topic }}"}, inputs=["topic"], usage={"total_tokens": 5})


# Rows in, lines out


async def test_a_row_is_a_run_and_a_line(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO, response_format="union")
    report = await batch(server.crew(price=0.5), topics(30))
    assert (report.total, report.completed, report.failed, report.uncertain, report.skipped) == (30, 30, 0, 0, 0)
    assert report.ok
    assert (report.kickoffs, report.cost, report.stopped) == (30, 15.0, None)
    assert report.usage is not None
    assert report.usage.total_tokens == 150
    assert server.kickoffs == 30
    assert set(server.kickoffs_by_key.values()) == {1}
    lines = batch.lines()
    assert sorted(line["output"] for line in lines.values()) == sorted(f"on topic {number}" for number in range(30))
    assert {line["state"] for line in lines.values()} == {"completed"}
    assert str(report).startswith(f"Batch {report.name}: 30 of 30 rows completed in ")


async def test_a_second_call_starts_nothing_and_reports_the_same(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY)
    rows = [*topics(20), {"topic": "bad one"}]
    first = await batch(server.crew(price=2), rows, name="leads")
    before = batch.output.read_bytes()
    requests = dict(server.requests)
    for _ in range(2):
        again = await batch(server.crew(price=2), rows, name="leads")
        assert (again.completed, again.failed, again.kickoffs, again.cost) == (20, 1, 0, first.cost)
    assert batch.output.read_bytes() == before
    beforehand = {"inputs": 0, "inspect": 0}
    assert {**server.requests, **beforehand} == {**requests, **beforehand}
    with pytest.raises(BatchFailedError, match=r"20 of 21 rows completed, 1 failed.*retry_failed=True") as caught:
        again.raise_for_failures()
    assert caught.value.report is again
    assert json.dumps(again.as_dict())


async def test_more_rows_or_another_crew_under_the_same_name_ask_for_a_decision(
    batch: Batches, crew_server: CrewServerFactory
):
    one, two = crew_server(ECHO), crew_server(ECHO)
    await batch(one.crew(), topics(5), name="growing")
    with pytest.raises(BatchChangedError, match=r"5 rows, not these 6.*on_change='continue'"):
        await batch(one.crew(), topics(6), name="growing")
    with pytest.raises(BatchChangedError, match=f"crew {one.url}, not {two.url}"):
        await batch(two.crew(), topics(5), name="growing")
    report = await batch(two.crew(), topics(6), name="growing", on_change="continue")
    assert (report.completed, report.kickoffs, one.kickoffs, two.kickoffs) == (6, 1, 5, 1)
    assert len(batch.lines()) == 6
    # Rows that have left the data set have no line, and are not counted.
    for _ in range(2):
        report = await batch(two.crew(), topics(7)[3:], name="growing", on_change="continue")
        assert (report.total, report.completed, len(batch.lines())) == (4, 4, 4)
    assert (one.kickoffs, two.kickoffs) == (5, 2)


async def test_crew_that_was_deployed_again_asks_for_a_decision(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO)
    await batch(server.crew(), topics(2), name="deployed")
    (before,) = {line["crew_version"] for line in batch.lines().values()}
    server.crews[""].program = load_program(PICKY)
    with pytest.raises(BatchChangedError, match=rf"version {before} of the crew, not \w+\. Nothing"):
        await batch(server.crew(), topics(3), name="deployed")
    await batch(server.crew(), topics(3), name="deployed", on_change="continue")
    versions = {key: line["crew_version"] for key, line in batch.lines().items()}
    assert sorted(versions.values()).count(before) == 2
    assert (len(set(versions.values())), server.kickoffs) == (2, 3)


async def test_version_that_is_unknown_refuses_nothing(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(ECHO)
    await batch(server.crew(), topics(1), name="unknown")
    with monkeypatch.context() as patch:
        patch.setattr(CrewClient, "version", lambda self: asyncio.sleep(0))
        assert (await batch(server.crew(), topics(1), name="unknown")).ok
    server.crews[""].program = load_program(PICKY)
    assert (await batch(server.crew(), topics(1), name="unknown")).ok, "no row is left to start"


async def test_definition_that_differs_each_time_refuses_nothing(batch: Batches, crew_server: CrewServerFactory):
    server, looks = crew_server(ECHO), itertools.count()
    server.crews[""].program.definition = lambda: {"uptime": next(looks)}  # type: ignore[attr-defined]
    await batch(server.crew(), topics(2), name="volatile", max_kickoffs=1)
    assert (await batch(server.crew(), topics(2), name="volatile")).ok
    assert next(looks) == 4


async def test_a_key_with_other_inputs_than_before_is_not_started_again(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO)
    await batch(server.crew(), [{"id": 1, "topic": "tea"}], name="keyed", key="id")
    rows = [{"id": 1, "topic": "coffee"}, {"id": 2, "topic": "milk"}]
    report = await batch(server.crew(), rows, name="keyed", key="id", on_change="continue")
    assert (report.completed, report.failed, server.kickoffs) == (1, 1, 2)
    lines = batch.lines()
    assert {key: (line["state"], line["inputs"]["topic"]) for key, line in lines.items()} == {
        "1": ("conflict", "coffee"),
        "2": ("completed", "milk"),
    }
    assert "kicked off before with other inputs" in lines["1"]["error"]
    # The completed run is back with its inputs.
    rows[0]["topic"] = "tea"
    report = await batch(server.crew(), rows, name="keyed", key="id", on_change="continue")
    assert (report.completed, server.kickoffs) == (2, 2)
    assert batch.lines()["1"]["output"] == "on tea"


async def test_a_failed_row_whose_data_was_corrected_is_started_again_where_that_is_asked_for(
    batch: Batches, crew_server: CrewServerFactory
):
    server = crew_server(PICKY)
    given: dict[str, Any] = {"name": f"corrected {uuid.uuid4().hex[:8]}", "key": "id", "on_change": "continue"}
    rows = [{"id": "a", "topic": "bad tea"}, {"id": "b", "topic": "milk"}, {"id": "c", "topic": "bad rye"}]
    assert (await batch(server.crew(), rows, **given)).failed == 2
    rows = [{"id": "a", "topic": "tea"}, {"id": "b", "topic": "cream"}, {"id": "c", "topic": "bad rice"}]
    report = await batch(server.crew(), rows, **given)
    assert (report.failed, report.conflicts, report.kickoffs) == (3, 3, 0), "nobody has asked for it"
    for number in range(2):
        report = await batch(server.crew(), rows, retry_failed=["a"], **given)
        assert (report.completed, report.conflicts, report.kickoffs) == (1, 2, 1 - number)
    report = await batch(server.crew(), rows, retry_failed=True, retries=1, **given)
    assert (report.completed, report.failed, report.conflicts, report.kickoffs) == (1, 2, 1, 2)
    lines = {key: (line["state"], line["inputs"]["topic"], line["output"]) for key, line in batch.lines().items()}
    assert lines == {
        "a": ("completed", "tea", "on tea"),
        "b": ("conflict", "cream", None),
        "c": ("failed", "bad rice", None),
    }
    assert server.kickoffs == 6
    async with Ledger(f"{batch.output}.ledger.db", given["name"]) as ledger:
        assert [one.attempt for one in await ledger.attempts(ledger.idempotency_key("c"))] == [1, 2, 3]


async def test_the_ledger_of_another_machine_is_missed(batch: Batches, crew_server: CrewServerFactory, tmp_path: Path):
    server = crew_server(ECHO)
    await batch(server.crew(), topics(3), name="here")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(LedgerMissingError, match=r"uses another ledger, .*out\.jsonl\.ledger\.db.*nothing was start"):
        await batch(server.crew(), topics(3), name="here", export=str(elsewhere / "out.jsonl"))
    assert server.kickoffs == 3
    report = await batch(
        server.crew(),
        topics(3),
        name="here",
        export=str(elsewhere / "b.jsonl"),
        ledger=str(batch.output) + ".ledger.db",
    )
    assert (report.completed, server.kickoffs) == (3, 3)
    assert len(batch.lines(elsewhere / "b.jsonl")) == 3


def exported(output: str) -> list[dict[str, Any]]:
    """Return the rows of an output, in their order."""
    with fsspec.open(output, "rb", compression="infer") as file:  # pyright: ignore
        if output.endswith(".parquet"):
            return pytest.importorskip("polars", reason="needs the extra `data`").read_parquet(file).to_dicts()
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("place", ["out.jsonl", "out.jsonl.gz", "out.parquet", "memory://lost/out.jsonl"])
async def test_an_output_that_is_gone_is_written_again(batch: Batches, crew_server: CrewServerFactory, place: str):
    server, name = crew_server(ECHO), f"gone {place}"
    output = place if "://" in place else str(batch.folder / place)
    files: Any = fsspec
    ledger = str(batch.folder / "ledger.db")
    await batch(server.crew(), topics(3), name=name, export=output, ledger=ledger)
    before = exported(output)
    assert [row["output"] for row in before] == [f"on topic {number}" for number in range(3)]
    filesystem, path = files.core.url_to_fs(output)
    filesystem.rm(path)
    report = await batch(server.crew(), topics(3), name=name, export=output, ledger=ledger)
    assert (report.completed, server.kickoffs) == (3, 3)
    assert exported(output) == before


async def test_an_output_is_written_again_whose_lines_are_others_though_their_states_are_the_same(
    batch: Batches, crew_server: CrewServerFactory
):
    server, runs = crew_server(ECHO), list[str]()

    async def shown(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        await batch(server.crew(), rows, name="same", **options)
        return [line["inputs"]["topic"] for line in batch.lines().values()]

    assert await shown(topics(3)) == ["topic 0", "topic 1", "topic 2"]
    assert await shown(topics(4)[1:], on_change="continue") == ["topic 1", "topic 2", "topic 3"]
    assert await shown(topics(4)[:0:-1]) == ["topic 3", "topic 2", "topic 1"]
    assert server.kickoffs == 4
    server = crew_server(PICKY)
    for retry in (False, True):
        await batch(
            server.crew(), [{"topic": "bad one"}], name="bad", export=f"{batch.output}.jsonl", retry_failed=retry
        )
        [line] = batch.lines(Path(f"{batch.output}.jsonl")).values()
        assert line["state"] == "failed"
        runs.append(line["kickoff_id"])
    assert runs[0] != runs[1]


async def test_who_comes_second_hears_so_before_it_reads_the_data_set(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO, faults=["status:500"])
    first = asyncio.ensure_future(batch(server.crew(), topics(5), name="read"))
    await until(lambda: server.kickoffs)

    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the data set was read")

    with pytest.raises(BatchBusyError, match="Batch 'read' is being run by another process"):
        await batch(server.crew(), Unread(topics(5)), name="read")
    server.faults.clear()
    assert (await first).ok
    assert server.kickoffs == 5
    assert not list(batch.folder.glob("*.lock"))


async def test_a_write_to_a_ledger_in_postgresql_reads_no_other_attempts(
    batch: Batches, crew_server: CrewServerFactory, postgres_address: str
):
    count = 1500
    server = crew_server(script({"output": "done"}, inputs=["topic"]))
    report = await batch(server.crew(), topics(count), name="large", ledger=postgres_address, max_in_flight=50)
    assert report.completed == count
    # What counts all rows at the end may read them all. Writes that did came to 200 times as many.
    assert await attempts_read_in_scans(postgres_address) <= 3 * count


# Data sets, inputs, keys


async def test_rows_of_a_file_that_has_not_changed_are_not_checked_again(
    batch: Batches, crew_server: CrewServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server, path = crew_server(ECHO), tmp_path / "rows.csv"
    path.write_text("topic\ntea\nmilk\n")
    first = await batch(server.crew(), path, name="as before")
    with monkeypatch.context() as patch:
        patch.setattr(RowPlan, "check", pytest.fail)
        again = await batch(server.crew(), path, name="as before")
        assert (again.completed, again.kickoffs) == (first.completed, 0) == (2, 0)
    for changed in ("topic\ntea\nrye\n", "topic\ntea\n"):
        path.write_text(changed)
        with pytest.raises(BatchChangedError, match=r"2 rows, not (2 others|these 1)"):
            await batch(server.crew(), path, name="as before")
    with pytest.raises(BatchChangedError):
        await batch(server.crew(), path, name="as before", inputs={"topic": "{{ topic }}!"})
    # In another order they are the same rows.
    path.write_text("topic\nmilk\ntea\n")
    assert (await batch(server.crew(), path, name="as before")).completed == 2
    assert server.kickoffs == 2


DIRTY = 'id,topic,note\n1,tea,x\n2,,x\n3,milk,x,y,z\n4,rye\n5,cake,"x"y\n6,"bread, white",x\n7,"two\nlines",x\n8,pie\n'
WRONG = [
    (3, "has no value for topic"),
    (4, "has 5 fields, the header has 3"),
    (5, "has 2 fields, the header has 3"),
    (6, "is not CSV: ',' expected after '\"'"),
    (10, "has 2 fields, the header has 3"),
]


async def test_bad_rows_are_counted_listed_and_written_out_in_every_later_report(
    batch: Batches, crew_server: CrewServerFactory, tmp_path: Path
):
    server, name = crew_server(ECHO), "bad rows"
    (tmp_path / "dirty.csv").write_text(DIRTY)
    with pytest.raises(BadRowsError, match=r"5 rows cannot be run: .*lines 5 and 10: has 2 fields") as caught:
        await batch(server.crew(), tmp_path / "dirty.csv", name=name, key="id")
    assert [(row.line, row.reason) for row in caught.value.rows] == WRONG
    assert (server.kickoffs, batch.output.exists()) == (0, False)
    rejected = Path(f"{batch.output}.rejected.jsonl")
    for number in (1, 2):
        report = await batch(server.crew(), tmp_path / "dirty.csv", name=name, key="id", on_bad_row="skip")
        assert (report.total, report.completed, report.bad_count, report.skipped, report.ok) == (8, 3, 5, 5, False)
        assert [(row.line, row.reason) for row in report.bad] == WRONG
        assert "3 of 8 rows completed, 5 bad in " in str(report)
        assert str(report).endswith(f"Bad rows: {rejected}")
        written = [json.loads(line) for line in rejected.read_text().splitlines()]
        assert [(line["line"], line["reason"]) for line in written] == WRONG
        assert [line["row"] for line in written[:3]] == [
            {"id": "2", "topic": "", "note": "x"},
            ["3", "milk", "x", "y", "z"],
            ["4", "rye"],
        ]
        assert len(pages := await batch.pages(name)) == number, "each flow run has its own"
        for part in (
            *("3 of 8 (37.5%)", "| Bad | 5 |", "| 3 | has no value for topic |"),
            *("| 4 | has 5 fields, the header has 3 |", str(rejected)),
        ):
            assert part in pages[-1]
    assert server.kickoffs == 3
    async with open_stored_batch(name) as known:
        found = await known.status()
    assert (found.total, found.completed, found.bad_count, found.left) == (8, 3, 5, 0)
    assert [(row.line, row.reason) for row in found.bad] == WRONG
    assert found.bad_export == str(rejected)
    # Once the file is repaired nothing is left of it.
    (tmp_path / "dirty.csv").write_text("id,topic,note\n1,tea,x\n")
    report = await batch(server.crew(), tmp_path / "dirty.csv", name=name, key="id", on_change="continue")
    assert (report.total, report.bad_count, report.ok, rejected.exists()) == (1, 0, True, False)
    async with open_stored_batch(name) as known:
        assert (await known.status()).bad_count == 0


async def test_no_secret_is_written_out_with_a_bad_row(batch: Batches, crew_server: CrewServerFactory, tmp_path: Path):
    server = crew_server(script({"output": "paid"}, inputs=["topic", "iban"]))
    (tmp_path / "rows.csv").write_text("topic,account\ntea,PT50\n,PT51\nmilk,PT52,x\n")
    await batch(
        *(server.crew(secret_inputs=["iban"]), tmp_path / "rows.csv"),
        inputs={"topic": "topic", "iban": "{{ account }}"},
        on_bad_row="skip",
    )
    text = Path(f"{batch.output}.rejected.jsonl").read_text()
    assert "PT5" not in text
    assert [json.loads(line)["row"] for line in text.splitlines()] == [{"topic": "", "account": "********"}, None]


@pytest.mark.parametrize("faults", [("inputs:500@1", "inputs:drop@2"), ("inputs:429@1", "inputs:503@2")])
async def test_a_moment_without_inputs_does_not_change_what_a_row_is(
    batch: Batches, crew_server: CrewServerFactory, faults: tuple[str, str]
):
    server = crew_server(ECHO, faults=faults)
    report = await batch(server.crew(), topics(2, note="no input"))
    assert report.ok
    assert all(set(line["inputs"]) == {"topic"} for line in batch.lines().values())


@pytest.mark.parametrize("fault", ["inputs:429=0.1", "inputs:502"])
async def test_a_server_that_cannot_say_its_inputs_now_starts_nothing(
    batch: Batches, crew_server: CrewServerFactory, fault: str
):
    server = crew_server(ECHO, faults=[fault])
    with pytest.raises((RateLimitedError, ServerError)):
        await batch(server.crew(), topics(2, note="no input"))
    assert server.kickoffs == 0
    assert (await batch(crew_server(ECHO, faults=["inputs:404"]).crew(allow_extra_inputs=True), topics(2))).ok


@pytest.mark.parametrize("fault", ["html", "redirect"])
async def test_a_web_page_in_place_of_the_inputs_starts_no_row(
    batch: Batches, crew_server: CrewServerFactory, fault: str
):
    server = crew_server(ECHO, faults=[f"inputs:{fault}"])
    with pytest.raises(ConfigurationError, match=r"is not the URL of a crew.*Nothing was started"):
        await batch(server.crew(), topics(2))
    assert server.requests["kickoff"] == 0


async def test_names_of_inputs_that_are_gone_start_no_row_again(batch: Batches, crew_server: CrewServerFactory):
    server, rows = crew_server(ECHO, faults=["inputs:404@2", "inputs:404@3"]), topics(2, note="no input")
    crew = server.crew(allow_extra_inputs=True)
    await batch(crew, rows, name="named")
    with pytest.raises(ConfigurationError, match=r"the rows of batch 'named' took.*Nothing was started"):
        await batch(crew, rows, name="named", on_change="continue")
    for options in ({"inputs": {"topic": "topic"}}, {}):
        report = await batch(crew, rows, name="named", on_change="continue", **options)
        assert (report.completed, report.kickoffs, server.kickoffs) == (2, 0, 2)
    server.crews[""].program = load_program(script({"output": "x"}))
    with pytest.raises(ConfigurationError, match="names no inputs now"):
        await batch(crew, rows, name="named", on_change="continue")


async def test_a_server_that_is_away_is_said_before_anything_is_made(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO)
    server.stop()
    with pytest.raises(CrewConnectionError):
        await batch(server.crew(), topics(2))
    assert list(batch.folder.glob("out*")) == []


async def test_typed_results_become_columns_and_misfits_have_their_reason(
    batch: Batches, crew_server: CrewServerFactory
):
    class Lead(BaseModel):
        name: str
        score: int

    class Loose(BaseModel):
        name: str
        score: str

    spec = script(
        {"output": '{"name": "{{ topic }}", "score": {{ "7" if topic == "topic 0" else \'"high"\' }}}'},
        inputs=["topic"],
    )
    server = crew_server(spec)
    report = await batch(server.crew(), topics(2), name="typed", output_type=Lead)
    assert (report.completed, report.failed, dict(report.errors)) == (1, 1, {"OutputTypeError": 1})
    lines = sorted(batch.lines().values(), key=lambda line: line["state"])
    assert lines[0]["data"] == {"name": "topic 0", "score": 7}
    assert (lines[1]["state"], lines[1]["data"]) == ("invalid-output", None)
    assert "score" in lines[1]["error"]
    assert '"high"' in lines[1]["output"], "what the crew wrote is kept"
    async with Ledger(f"{batch.output}.ledger.db", "typed") as ledger:
        assert await ledger.counts() == {"completed": 1, "invalid-output": 1}, "known to whoever asks the ledger alone"
    # Repairing the type starts nothing.
    report = await batch(server.crew(), topics(2), name="typed", output_type=Loose)
    assert (report.completed, report.failed, server.kickoffs) == (1, 1, 2)
    assert {line["state"] for line in batch.lines().values()} == {"completed", "invalid-output"}
    async with Ledger(f"{batch.output}.ledger.db", "typed") as ledger:
        assert await ledger.counts() == {"completed": 1, "invalid-output": 1}
    # The same type by its name, before and after it was edited.
    Loose.__qualname__ = Lead.__qualname__
    for kind, score in ((Lead, 7), (Loose, "high")):
        await batch(server.crew(), topics(2), name="typed", output_type=kind)
        [line] = (line for line in batch.lines().values() if line["state"] == "completed")
        assert (line["data"]["score"], server.kickoffs) == (score, 2)


async def test_a_result_is_judged_before_its_secrets_are_masked(batch: Batches, crew_server: CrewServerFactory):
    class Lead(BaseModel):
        year: int

    class Wider(BaseModel):
        year: int
        note: str = ""

    server = crew_server(script({"output": '{"year": {{ pin }}}'}, inputs=["topic", "pin"]))
    rows = [{"topic": "tea", "pin": "1985"}]
    given = {"name": f"masked {uuid.uuid4().hex[:8]}", "key": "topic", "retries": 1}
    for kind in (Lead, Wider):
        report = await batch(server.crew(secret_inputs=["pin"]), rows, output_type=kind, **given)
        assert (report.completed, report.failed, server.kickoffs) == (1, 0, 1)
        assert batch.lines()["tea"]["output"] == f'{{"year": {MASK}}}'


async def test_masks_make_no_result_of_a_misfit(batch: Batches, crew_server: CrewServerFactory):
    class Short(BaseModel):
        pin: str = Field(max_length=len(MASK))

    server = crew_server(script({"output": '{"pin": "{{ pin }}"}'}, inputs=["topic", "pin"]))
    crew, rows = server.crew(secret_inputs=["pin"], max_attempts=1), [{"topic": "tea", "pin": "long-secret-pin"}]
    for retry_failed in (False, True):
        about: dict[str, Any] = {"name": "misfit", "key": "topic", "retry_failed": retry_failed}
        report = await batch(crew, rows, output_type=Short, **about)
        assert (report.completed, report.failed, server.kickoffs) == (0, 1, 1)


class Customer(BaseModel):
    pin: str

    @field_validator("pin")
    @classmethod
    def _known(cls, pin: str) -> str:
        raise ValueError(f"unknown customer {pin.lower()}")


async def test_a_validator_quotes_no_secret_in_other_words(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(script({"output": '{"pin": "{{ pin }}"}'}, inputs=["topic", "pin"]))
    crew, rows = server.crew(secret_inputs=["pin"], max_attempts=1), [{"topic": "tea", "pin": "PIN-OF-ANN"}]
    for _ in range(2):
        report = await batch(crew, rows, name="quotes", key="topic", output_type=Customer)
        assert (report.completed, report.failed, server.kickoffs) == (0, 1, 1)
        assert batch.lines()["tea"]["error"] == MISFIT_WITHOUT_REASONS
    everything = b"".join(path.read_bytes() for path in batch.folder.rglob("*") if path.is_file())
    assert b"pin-of-ann" not in everything


class Strict(BaseModel):
    name: str

    @model_validator(mode="before")
    @classmethod
    def _of_report(cls, data: Any) -> Any:
        return data["report"]  # a KeyError, which pydantic does not make a ValidationError of

    @field_serializer("name")
    def _shown(self, name: str) -> str:
        raise LookupError(name)


async def test_a_validator_that_raises_whatever_it_likes_fails_its_row_alone(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, states = crew_server(script({"output": '{"{{ topic }}": {"name": "x"}}'}, inputs=["topic"])), list[str]()
    put = GroupWriter.put

    async def seen(self: GroupWriter, write: Write, **options: Any) -> bool:
        states.append(write.attempt.state)
        return await put(self, write, **options)

    monkeypatch.setattr(GroupWriter, "put", seen)
    rows = [{"topic": topic} for topic in ("other", "report", "another")]
    given: dict[str, Any] = {"name": f"strict {uuid.uuid4().hex[:8]}", "output_type": Strict, "key": "topic"}
    for errors in ({"OutputTypeError": 2}, {}):
        report = await batch(server.crew(), rows, **given)
        assert (report.completed, report.failed, dict(report.errors)) == (1, 2, errors)
        lines = batch.lines()
        assert [line["state"] for line in lines.values()] == ["invalid-output", "completed", "invalid-output"]
        assert "KeyError: 'report'" in lines["other"]["error"]
        # What its own serializer refuses is there as the crew's server gave it.
        assert (lines["other"]["data"], lines["report"]["output"]) == (None, '{"report": {"name": "x"}}')
        batch.output.unlink()
    assert server.kickoffs == 3
    ends = ["completed", "invalid-output", "invalid-output"]
    assert sorted(states) == sorted(["claimed", "started"] * 3 + ends), "three writes a row: its end has its judgement"


async def test_an_output_is_exported_while_the_batch_runs_and_written_where_it_stops(
    batch: Batches, crew_server: CrewServerFactory
):
    server = crew_server(script({"seconds": "{{ 60 if 'slow' in topic else 0 }}", "output": "x"}, inputs=["topic"]))
    rows = [{"topic": "slow"}, *topics(5)]
    running = asyncio.ensure_future(batch(server.crew(), rows, name="exported", on_cancel="leave"))
    early = str(batch.folder / "early.jsonl")
    async with Ledger(f"{batch.output}.ledger.db", "exported") as ledger:
        while (await ledger.counts()).get(RowState.COMPLETED, 0) < 5:
            await asyncio.sleep(0.05)
    async with open_stored_batch("exported") as stored:
        assert await stored.export(early) == (early, 5)
        assert await stored.export(early) == (early, 5), "it is of this batch"
        with pytest.raises(ConfigurationError, match="is not on record: its crew is not a stored block"):
            await stored.export()
    assert not batch.output.exists()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert batch.output.read_bytes() == Path(early).read_bytes()
    assert not list(batch.folder.glob(".*.new"))


LATE = script({"seconds": "{{ 3 if 'slow' in topic else 0 }}", "output": "on {{ topic }}"}, inputs=["topic"])


async def test_a_file_that_another_batch_wrote_meanwhile_is_kept(batch: Batches, crew_server: CrewServerFactory):
    server, slow = crew_server(LATE), [{"topic": "slow"}]
    late = asyncio.ensure_future(batch(server.crew(), slow, name="late"))
    await until(lambda: server.kickoffs >= 1)
    await batch(server.crew(), topics(2), name="early")
    with pytest.raises(ExportError, match=r"is not from this batch: move that file. All results are in the ledger"):
        await late
    assert [line["output"] for line in batch.lines().values()] == ["on topic 0", "on topic 1"]
    batch.output.unlink()
    await batch(server.crew(), slow, name="late")
    assert [line["output"] for line in batch.lines().values()] == ["on slow"]
    assert server.kickoffs == 3


async def test_an_export_beside_a_batch_that_ends_has_all_lines(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(LATE)
    running = asyncio.ensure_future(batch(server.crew(), [{"topic": "slow"}, *topics(2)], name="beside"))
    async with Ledger(f"{batch.output}.ledger.db", "beside") as ledger:
        while (await ledger.counts()).get(RowState.COMPLETED, 0) < 2:
            await asyncio.sleep(0.05)
    async with open_stored_batch("beside") as stored:
        lines = stored.ledger.lines
        assert await stored.export(str(batch.output)) == (str(batch.output), 2)

        async def lines_until_the_batch_ends() -> AsyncIterator[Any]:
            async for page in lines():
                yield page
            await running

        monkeypatch.setattr(stored.ledger, "lines", lines_until_the_batch_ends)
        assert await stored.export(str(batch.output)) == (str(batch.output), 3)
    assert len(batch.lines()) == 3


# Prefect


async def test_a_flow_of_its_own_is_named_after_the_batch_and_stores_no_secret(
    batch: Batches, crew_server: CrewServerFactory
):
    server = crew_server(ECHO)
    name = f"leads {uuid.uuid4().hex[:6]}"
    await batch(server.crew(), topics(2), name=name)
    async with get_client() as client:
        [run] = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    assert set(run.parameters) == {"batch", "crew", "dataset", "export"}
    assert server.token not in json.dumps(run.parameters)


async def test_a_scheduled_batch_has_its_name_and_output_from_the_scheduled_time(
    batch: Batches, crew_server: CrewServerFactory
):
    crew = crew_server(ECHO).crew()

    @flow
    async def nightly() -> Any:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        report = await batch(
            crew,
            topics(2),
            name="leads {scheduled_start:%Y-%m-%d %H:%M:%S}",
            export=str(batch.folder / "leads-{scheduled_start:%Y}.jsonl"),
        )
        return report, context.flow_run.expected_start_time

    report, moment = await nightly()
    assert report.name == f"leads {moment:%Y-%m-%d %H:%M:%S}"
    assert report.export.endswith(f"leads-{moment:%Y}.jsonl")


def test_sync_code_has_the_same(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO)
    report = run_batch(server.crew(), topics(3), name="sync", export=str(batch.output))
    assert report.completed == 3
    plan = plan_batch(server.crew(), topics(4), name="sync", export=str(batch.output))
    assert (plan.rows, plan.done) == (4, 3)
    assert plan_batch(server.crew(), topics(4), name="sync").done == 3, "the ledger is found by the batch's name"


# What is refused


@pytest.mark.usefixtures("prefect_api")
async def test_names_that_no_ledger_could_keep_are_refused():
    for name in ("", " ", "x" * 201, "a\nb", "a\0b"):
        with pytest.raises(ConfigurationError, match="printable name of 1 to 200"):
            await arun_batch(CREW, topics(1), name=name, export="out.jsonl")


async def test_webhooks_without_a_secret_are_reported_before_anything_is_started(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(slow(0))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "https://hooks.example.com")
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        await batch(server.crew(), [{"a": 1}])
    assert server.kickoffs == 0


# What is secret

REPEATS = script(
    {"name": "pay", "output": "paid with {{ inputs.values() | join }}", "fail": "{{ 'no ' + iban if 'bad' in topic }}"},
    inputs=["topic", "iban", "pin", "code"],
)


@pytest.mark.parametrize("is_rotated", [True, False])
async def test_a_batch_that_goes_on_with_another_secret_writes_nothing_that_it_cannot_mask(
    batch: Batches, crew_server: CrewServerFactory, is_rotated: bool
):
    held, old = Held(), f"old-{uuid.uuid4().hex}"
    held.output = f"paid with {old}"
    server, new = crew_server(held), f"new-{uuid.uuid4().hex}" if is_rotated else old
    crew = server.crew(secret_inputs=["iban"])

    async def run(secret: str) -> BatchReport:
        given = {"topic": "topic", "iban": lambda _: secret}
        return await batch(crew, [{"topic": "tea"}], name=f"rotated {is_rotated}", key="topic", inputs=given)

    running = asyncio.ensure_future(run(old))
    await until(lambda: server.requests["status"])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    held.release()
    assert ((await run(new)).completed, server.kickoffs) == (1, 1)
    assert batch.lines()["tea"]["output"] == (WITHHELD if is_rotated else f"paid with {MASK}")
    everything = b"".join(path.read_bytes() for path in batch.folder.rglob("*") if path.is_file())
    assert old.encode() not in everything


async def test_no_file_of_a_batch_has_a_secret_input_whatever_way_it_came_in(
    batch: Batches, crew_server: CrewServerFactory
):
    server, secrets = crew_server(REPEATS), {way: f"{way}-{uuid.uuid4().hex}" for way in ("iban", "pin", "code")}
    given = {
        "topic": "topic",
        "iban": lambda row: secrets["iban"],
        "pin": SecretStr(secrets["pin"]),
        "code": lambda row: SecretStr(secrets["code"]),
    }
    crew = server.crew(secret_inputs=["iban"])
    before = os.umask(0)
    try:
        for ending in ("jsonl.gz", "jsonl"):
            report = await batch(
                *(crew, [{"topic": "tea"}, {"topic": "bad"}]), key="topic", inputs=given,
                export=str(batch.folder / f"out.{ending}"),
            )  # fmt: skip
            assert (report.completed, report.failed) == (1, 1)
    finally:
        os.umask(before)
    assert all(run.inputs.items() >= secrets.items() for run in server.runs)
    lines = batch.lines()
    assert lines["tea"]["inputs"] == {"topic": "tea", **dict.fromkeys(secrets, MASK)}
    assert lines["tea"]["output"] == lines["tea"]["tasks"][0]["output"] == f"paid with tea{MASK}{MASK}{MASK}"
    assert lines["bad"]["error"] == f"no {MASK}"
    files = [path for path in batch.folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert {stat.filemode(path.stat().st_mode) for path in files} == {"-rw-------"}, "for their owner only"
    everything = b"".join((gzip.open if path.suffix == ".gz" else open)(path, "rb").read() for path in files)
    assert [way for way, secret in secrets.items() if secret.encode() in everything] == []
