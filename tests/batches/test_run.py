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
from prefect.runtime import flow_run
from pydantic import BaseModel, Field, SecretStr, create_model, field_serializer, field_validator, model_validator

import prefect_crew as pc
from prefect_crew.batches.attempts import Write
from prefect_crew.batches.database import GroupWriter
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.outcomes import MISFIT_WITHOUT_REASONS, RowState
from prefect_crew.batches.rows import RowPlan
from prefect_crew.batches.stored import open_stored_batch
from prefect_crew.client.redaction import MASK
from prefect_crew.devserver import CrewServer
from prefect_crew.devserver._scripts import load_program
from prefect_crew.runs.run import WITHHELD
from prefect_crew.testing import CrewServerFactory
from support.batches import CREW, Batches, attempts_read_in_scans, topics
from support.held import Held
from support.scripts import PICKY, script
from support.waiting import until


async def test_a_row_is_a_run_and_a_line(batch: Batches, crew_server: CrewServerFactory):
    spec = script({"output": "on {{ topic }}"}, inputs=["topic"], usage={"total_tokens": 5})
    server = crew_server(spec, response_format="union")
    report = await batch(server.crew(price=0.5), topics(30))
    assert (report.total, report.completed, report.failed, report.uncertain, report.skipped) == (30, 30, 0, 0, 0)
    assert report.ok
    assert (report.kickoffs, report.cost, report.stopped) == (30, 15.0, None)
    assert report.usage == pc.TokenUsage(total_tokens=150)
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
    with pytest.raises(pc.BatchFailedError, match=r"20 of 21 rows completed, 1 failed.*retry_failed=True") as caught:
        again.raise_for_failures()
    assert caught.value.report is again
    assert json.dumps(again.as_dict())


async def test_a_changed_batch_asks_for_a_decision(batch: Batches, crew_server: CrewServerFactory):
    one, two = crew_server(PICKY), crew_server(PICKY)
    await batch(one.crew(), topics(5), name="growing")
    changes = (one, 6, r"5 rows, not these 6.*on_change='continue'"), (two, 5, f"crew {one.url}, not {two.url}")
    for server, count, problem in changes:
        with pytest.raises(pc.BatchChangedError, match=problem):
            await batch(server.crew(), topics(count), name="growing")
    report = await batch(two.crew(), topics(6), name="growing", on_change="continue")
    assert (report.completed, report.kickoffs, one.kickoffs, two.kickoffs) == (6, 1, 5, 1)
    assert len(batch.lines()) == 6
    # Rows that have left the data set have no line, and are not counted.
    for _ in range(2):
        report = await batch(two.crew(), topics(7)[3:], name="growing", on_change="continue")
        assert (report.total, report.completed, len(batch.lines())) == (4, 4, 4)
    assert (one.kickoffs, two.kickoffs) == (5, 2)


async def test_another_deployment_asks_for_a_decision(batch: Batches, echo: CrewServer):
    await batch(echo.crew(), topics(2), name="deployed")
    (before,) = {line["crew_version"] for line in batch.lines().values()}
    echo.crews[""].program = load_program(PICKY)
    with pytest.raises(pc.BatchChangedError, match=rf"version {before} of the crew, not \w+\. Nothing"):
        await batch(echo.crew(), topics(3), name="deployed")
    await batch(echo.crew(), topics(3), name="deployed", on_change="continue")
    versions = {key: line["crew_version"] for key, line in batch.lines().items()}
    assert sorted(versions.values()).count(before) == 2
    assert (len(set(versions.values())), echo.kickoffs) == (2, 3)


async def test_an_unknown_version_is_no_change(batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch):
    await batch(echo.crew(), topics(1), name="unknown")
    with monkeypatch.context() as patch:
        patch.setattr(pc.CrewClient, "version", lambda self: asyncio.sleep(0))
        assert (await batch(echo.crew(), topics(1), name="unknown")).ok
    echo.crews[""].program = load_program(PICKY)
    assert (await batch(echo.crew(), topics(1), name="unknown")).ok, "no row is left to start"


async def test_definition_that_differs_each_time_refuses_nothing(batch: Batches, echo: CrewServer):
    looks = itertools.count()
    echo.crews[""].program.definition = lambda: {"uptime": next(looks)}  # type: ignore[attr-defined]
    await batch(echo.crew(), topics(2), name="volatile", max_kickoffs=1)
    assert (await batch(echo.crew(), topics(2), name="volatile")).ok
    assert next(looks) == 4


async def test_a_key_with_other_inputs_than_before_is_not_started_again(batch: Batches, echo: CrewServer):
    await batch(echo.crew(), [{"id": 1, "topic": "tea"}], name="keyed", key="id")
    rows = [{"id": 1, "topic": "coffee"}, {"id": 2, "topic": "milk"}]
    report = await batch(echo.crew(), rows, name="keyed", key="id", on_change="continue")
    assert (report.completed, report.failed, echo.kickoffs) == (1, 1, 2)
    lines = batch.lines()
    states = {key: (line["state"], line["inputs"]["topic"]) for key, line in lines.items()}
    assert states == {"1": ("conflict", "coffee"), "2": ("completed", "milk")}
    assert "kicked off before with other inputs" in lines["1"]["error"]
    # The completed run is back with its inputs.
    rows[0]["topic"] = "tea"
    report = await batch(echo.crew(), rows, name="keyed", key="id", on_change="continue")
    assert (report.completed, echo.kickoffs) == (2, 2)
    assert batch.lines()["1"]["output"] == "on tea"


async def test_a_corrected_row_is_started_where_asked(batch: Batches, crew_server: CrewServerFactory):
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
    lines = [(line["state"], line["inputs"]["topic"], line["output"]) for line in batch.lines().values()]
    assert lines == [("completed", "tea", "on tea"), ("conflict", "cream", None), ("failed", "bad rice", None)]
    assert server.kickoffs == 6
    async with Ledger(f"{batch.output}.ledger.db", given["name"]) as ledger:
        assert [one.attempt for one in await ledger.attempts(ledger.idempotency_key("c"))] == [1, 2, 3]


async def test_the_ledger_of_another_machine_is_missed(batch: Batches, echo: CrewServer, tmp_path: Path):
    await batch(echo.crew(), topics(3), name="here")
    (elsewhere := tmp_path / "elsewhere" / "out.jsonl").parent.mkdir()
    with pytest.raises(pc.LedgerMissingError, match=r"uses another ledger, .*out\.jsonl\.ledger\.db.*nothing was st"):
        await batch(echo.crew(), topics(3), name="here", export=str(elsewhere))
    assert echo.kickoffs == 3
    report = await batch(echo.crew(), topics(3), name="here", export=str(elsewhere), ledger=f"{batch.output}.ledger.db")
    assert (report.completed, echo.kickoffs, len(batch.lines(elsewhere))) == (3, 3, 3)


def exported(output: str) -> list[dict[str, Any]]:
    """Return the rows of an output, in their order."""
    with fsspec.open(output, "rb", compression="infer") as file:  # pyright: ignore
        if output.endswith(".parquet"):
            return pytest.importorskip("polars", reason="needs the extra `data`").read_parquet(file).to_dicts()
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("place", ["out.jsonl", "out.jsonl.gz", "out.parquet", "memory://lost/out.jsonl"])
async def test_an_output_that_is_gone_is_written_again(batch: Batches, echo: CrewServer, place: str):
    name = f"gone {place}"
    output = place if "://" in place else str(batch.folder / place)
    files: Any = fsspec
    ledger = str(batch.folder / "ledger.db")
    await batch(echo.crew(), topics(3), name=name, export=output, ledger=ledger)
    before = exported(output)
    assert [row["output"] for row in before] == [f"on topic {number}" for number in range(3)]
    filesystem, path = files.core.url_to_fs(output)
    filesystem.rm(path)
    report = await batch(echo.crew(), topics(3), name=name, export=output, ledger=ledger)
    assert (report.completed, echo.kickoffs) == (3, 3)
    assert exported(output) == before


async def test_an_output_with_other_lines_is_written_again(batch: Batches, crew_server: CrewServerFactory):
    server, runs = crew_server(PICKY), set[str]()

    async def shown(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        await batch(server.crew(), rows, name="same", **options)
        return [line["inputs"]["topic"] for line in batch.lines().values()]

    assert await shown(topics(3)) == ["topic 0", "topic 1", "topic 2"]
    assert await shown(topics(4)[1:], on_change="continue") == ["topic 1", "topic 2", "topic 3"]
    assert await shown(topics(4)[:0:-1]) == ["topic 3", "topic 2", "topic 1"]
    assert server.kickoffs == 4
    output = Path(f"{batch.output}.jsonl")
    for retry in (False, True):
        await batch(server.crew(), [{"topic": "bad one"}], name="bad", export=str(output), retry_failed=retry)
        [line] = batch.lines(output).values()
        assert line["state"] == "failed"
        runs.add(line["kickoff_id"])
    assert len(runs) == 2


async def test_the_second_call_reads_no_data_set(batch: Batches, echo: CrewServer):
    echo.faults.add("status:500")
    first = asyncio.ensure_future(batch(echo.crew(), topics(5), name="read"))
    await until(lambda: echo.kickoffs, "a kickoff")

    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the data set was read")

    with pytest.raises(pc.BatchBusyError, match="Batch 'read' is being run by another process"):
        await batch(echo.crew(), Unread(topics(5)), name="read")
    echo.faults.clear()
    assert (await first).ok
    assert echo.kickoffs == 5
    assert not list(batch.folder.glob("*.lock"))


async def test_a_write_reads_no_other_attempts(batch: Batches, echo: CrewServer, postgres_address: str):
    count = 1500
    report = await batch(echo.crew(), topics(count), name="large", ledger=postgres_address, max_in_flight=50)
    assert report.completed == count
    # What counts all rows at the end may read them all. Writes that did came to 200 times as many.
    assert await attempts_read_in_scans(postgres_address) <= 3 * count


async def test_an_unchanged_file_is_not_checked_again(
    batch: Batches, echo: CrewServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "rows.csv"
    path.write_text("topic\ntea\nmilk\n")
    first = await batch(echo.crew(), path, name="as before")
    with monkeypatch.context() as patch:
        patch.setattr(RowPlan, "check", pytest.fail)
        again = await batch(echo.crew(), path, name="as before")
        assert (again.completed, again.kickoffs) == (first.completed, 0) == (2, 0)
    for changed in ("topic\ntea\nrye\n", "topic\ntea\n"):
        path.write_text(changed)
        with pytest.raises(pc.BatchChangedError, match=r"the same number of rows, 2, with|2 rows, not these 1"):
            await batch(echo.crew(), path, name="as before")
    with pytest.raises(pc.BatchChangedError):
        await batch(echo.crew(), path, name="as before", inputs={"topic": "{{ topic }}!"})
    # In another order they are the same rows.
    path.write_text("topic\nmilk\ntea\n")
    assert (await batch(echo.crew(), path, name="as before")).completed == 2
    assert echo.kickoffs == 2


DIRTY = 'id,topic,note\n1,tea,x\n2,,x\n3,milk,x,y,z\n4,rye\n5,cake,"x"y\n6,"bread, white",x\n7,"two\nlines",x\n8,pie\n'
WRONG = [
    (3, "has no value for topic"),
    (4, "has 5 fields, the header has 3"),
    (5, "has 2 fields, the header has 3"),
    (6, "is not CSV: ',' expected after '\"'"),
    (10, "has 2 fields, the header has 3"),
]


async def test_bad_rows_are_in_every_report(batch: Batches, echo: CrewServer, tmp_path: Path):
    name = "set aside"
    (tmp_path / "dirty.csv").write_text(DIRTY)
    with pytest.raises(pc.BadRowsError, match=r"5 rows cannot be run: .*lines 5 and 10: has 2 fields") as caught:
        await batch(echo.crew(), tmp_path / "dirty.csv", name=name, key="id")
    assert [(row.line, row.reason) for row in caught.value.rows] == WRONG
    assert (echo.kickoffs, batch.output.exists()) == (0, False)
    rejected = Path(f"{batch.output}.rejected.jsonl")
    for number in (1, 2):
        report = await batch(echo.crew(), tmp_path / "dirty.csv", name=name, key="id", on_bad_row="skip")
        assert (report.total, report.completed, report.bad_count, report.skipped, report.ok) == (8, 3, 5, 5, False)
        assert [(row.line, row.reason) for row in report.bad] == WRONG
        assert "3 of 8 rows completed, 5 bad in " in str(report)
        assert str(report).endswith(f"Bad rows: {rejected}")
        written = [json.loads(line) for line in rejected.read_text().splitlines()]
        assert [(line["line"], line["reason"]) for line in written] == WRONG
        first = {"id": "2", "topic": "", "note": "x"}
        assert [line["row"] for line in written[:3]] == [first, ["3", "milk", "x", "y", "z"], ["4", "rye"]]
        assert len(pages := await batch.pages(name)) == number, "each flow run has its own"
        bad = "| 3 | has no value for topic |\n| 4 | has 5 fields, the header has 3 |"
        for part in ("3 of 8 (37.5%)", "| Bad | 5 |", bad, str(rejected)):
            assert part in pages[-1]
    assert echo.kickoffs == 3
    async with open_stored_batch(name) as known:
        found = await known.status()
    assert (found.total, found.completed, found.bad_count, found.left) == (8, 3, 5, 0)
    assert [(row.line, row.reason) for row in found.bad] == WRONG
    assert found.bad_export == str(rejected)
    # Once the file is repaired nothing is left of it.
    (tmp_path / "dirty.csv").write_text("id,topic,note\n1,tea,x\n")
    report = await batch(echo.crew(), tmp_path / "dirty.csv", name=name, key="id", on_change="continue")
    assert (report.total, report.bad_count, report.ok, rejected.exists()) == (1, 0, True, False)
    async with open_stored_batch(name) as known:
        assert (await known.status()).bad_count == 0


async def test_a_bad_row_shows_no_secret(batch: Batches, crew_server: CrewServerFactory, tmp_path: Path):
    server = crew_server(script({"output": "paid"}, inputs=["topic", "iban"]))
    (tmp_path / "rows.csv").write_text("topic,account\ntea,PT50\n,PT51\nmilk,PT52,x\n")
    inputs = {"topic": "topic", "iban": "{{ account }}"}
    await batch(server.crew(secret_inputs=["iban"]), tmp_path / "rows.csv", inputs=inputs, on_bad_row="skip")
    text = Path(f"{batch.output}.rejected.jsonl").read_text()
    assert "PT5" not in text
    assert [json.loads(line)["row"] for line in text.splitlines()] == [{"topic": "", "account": "********"}, None]


@pytest.mark.parametrize("faults", [("inputs:500@1", "inputs:drop@2"), ("inputs:429@1", "inputs:503@2")])
async def test_a_moment_without_inputs_changes_no_row(batch: Batches, echo: CrewServer, faults: tuple[str, str]):
    echo.faults.add(*faults)
    assert (await batch(echo.crew(), topics(2, note="no input"))).ok
    assert all(set(line["inputs"]) == {"topic"} for line in batch.lines().values())


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("429=0.1", "429"),
        ("502", "502"),
        ("html", r"is not the URL of a crew.*Nothing was started"),
        ("redirect", r"is not the URL of a crew.*Nothing was started"),
    ],
)
async def test_a_server_without_inputs_starts_nothing(batch: Batches, echo: CrewServer, fault: str, problem: str):
    echo.faults.add(f"inputs:{fault}")
    with pytest.raises((pc.RateLimitedError, pc.ServerError, pc.ConfigurationError), match=problem):
        await batch(echo.crew(), topics(2, note="no input"))
    assert echo.requests["kickoff"] == 0
    echo.faults.clear()
    echo.faults.add("inputs:404")
    assert (await batch(echo.crew(allow_extra_inputs=True), topics(2))).ok


async def test_names_of_inputs_that_are_gone_start_no_row_again(batch: Batches, echo: CrewServer):
    server, rows = echo, topics(2, note="no input")
    server.faults.add("inputs:404@2", "inputs:404@3")
    crew = server.crew(allow_extra_inputs=True)
    await batch(crew, rows, name="named")
    with pytest.raises(pc.ConfigurationError, match=r"the rows of batch 'named' took.*Nothing was started"):
        await batch(crew, rows, name="named", on_change="continue")
    for options in ({"inputs": {"topic": "topic"}}, {}):
        report = await batch(crew, rows, name="named", on_change="continue", **options)
        assert (report.completed, report.kickoffs, server.kickoffs) == (2, 0, 2)
    server.crews[""].program = load_program(script({"output": "x"}))
    with pytest.raises(pc.ConfigurationError, match="names no inputs now"):
        await batch(crew, rows, name="named", on_change="continue")


async def test_a_server_that_is_away_leaves_no_files(batch: Batches, echo: CrewServer):
    echo.stop()
    with pytest.raises(pc.CrewConnectionError):
        await batch(echo.crew(), topics(2))
    assert list(batch.folder.glob("out*")) == []


async def test_typed_results_are_data_and_misfits_have_reasons(batch: Batches, crew_server: CrewServerFactory):
    kinds = {"Lead": int, "Loose": str}
    lead, loose = (create_model(title, name=(str, ...), score=(kind, ...)) for title, kind in kinds.items())
    text = '{"name": "{{ topic }}", "score": {{ "7" if topic == "topic 0" else \'"high"\' }}}'
    server = crew_server(script({"output": text}, inputs=["topic"]))
    report = await batch(server.crew(), topics(2), name="typed", output_type=lead)
    assert (report.completed, report.failed, dict(report.errors)) == (1, 1, {"OutputTypeError": 1})
    lines = sorted(batch.lines().values(), key=lambda line: line["state"])
    assert lines[0]["data"] == {"name": "topic 0", "score": 7}
    assert (lines[1]["state"], lines[1]["data"]) == ("invalid-output", None)
    assert "score" in lines[1]["error"]
    assert '"high"' in lines[1]["output"], "what the crew wrote is kept"
    async with Ledger(f"{batch.output}.ledger.db", "typed") as ledger:
        assert await ledger.counts() == {"completed": 1, "invalid-output": 1}, "known to whoever asks the ledger alone"
    # Repairing the type starts nothing.
    report = await batch(server.crew(), topics(2), name="typed", output_type=loose)
    assert (report.completed, report.failed, server.kickoffs) == (1, 1, 2)
    assert {line["state"] for line in batch.lines().values()} == {"completed", "invalid-output"}
    async with Ledger(f"{batch.output}.ledger.db", "typed") as ledger:
        assert await ledger.counts() == {"completed": 1, "invalid-output": 1}
    # The same type by its name, before and after it was edited.
    loose.__qualname__ = lead.__qualname__
    for kind, score in ((lead, 7), (loose, "high")):
        await batch(server.crew(), topics(2), name="typed", output_type=kind)
        [line] = (line for line in batch.lines().values() if line["state"] == "completed")
        assert (line["data"]["score"], server.kickoffs) == (score, 2)


async def test_a_result_is_judged_before_its_secrets_are_masked(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(script({"output": '{"year": {{ pin }}}'}, inputs=["topic", "pin"]))
    rows = [{"topic": "tea", "pin": "1985"}]
    given = {"name": f"masked {uuid.uuid4().hex[:8]}", "key": "topic", "retries": 1}
    for kind in (create_model("Lead", year=(int, ...)), create_model("Wider", year=(int, ...), note=(str, ""))):
        report = await batch(server.crew(secret_inputs=["pin"]), rows, output_type=kind, **given)
        assert (report.completed, report.failed, server.kickoffs) == (1, 0, 1)
        assert batch.lines()["tea"]["output"] == f'{{"year": {MASK}}}'


class Short(BaseModel):
    pin: str = Field(max_length=len(MASK))


class Customer(BaseModel):
    pin: str

    @field_validator("pin")
    @classmethod
    def _known(cls, pin: str) -> str:
        raise ValueError(f"unknown customer {pin.lower()}")


@pytest.mark.parametrize("kind", [Short, Customer])  # the mask would fit; a validator quotes the secret in other words
async def test_a_misfit_stays_one_and_shows_no_secret(batch: Batches, crew_server: CrewServerFactory, kind: Any):
    server = crew_server(script({"output": '{"pin": "{{ pin }}"}'}, inputs=["topic", "pin"]))
    crew, rows = server.crew(secret_inputs=["pin"], max_attempts=1), [{"topic": "tea", "pin": "PIN-OF-ANN"}]
    for retry_failed in (False, True):
        about: dict[str, Any] = {"name": f"a {kind.__name__}", "key": "topic", "retry_failed": retry_failed}
        report = await batch(crew, rows, output_type=kind, **about)
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


async def test_a_raising_validator_fails_its_row_alone(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, states = crew_server(script({"output": '{"{{ topic }}": {"name": "x"}}'}, inputs=["topic"])), list[str]()
    put = GroupWriter.put

    async def seen(self: GroupWriter, write: Write, **options: Any) -> bool:
        states.append(write.attempt.state)
        return await put(self, write, **options)

    monkeypatch.setattr(GroupWriter, "put", seen)
    rows = [{"topic": topic} for topic in ("other", "report", "another")]
    for errors in ({"OutputTypeError": 2}, {}):
        report = await batch(server.crew(), rows, name="strict", output_type=Strict, key="topic")
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


async def completed(batch: Batches, name: str, count: int) -> None:
    """Wait until so many rows of a batch that runs have completed."""
    async with Ledger(f"{batch.output}.ledger.db", name) as ledger:
        while (await ledger.counts()).get(RowState.COMPLETED, 0) < count:
            await asyncio.sleep(0.05)


async def test_an_output_is_exported_while_the_batch_runs(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(script({"seconds": "{{ 60 if 'slow' in topic else 0 }}", "output": "x"}, inputs=["topic"]))
    rows = [{"topic": "slow"}, *topics(5)]
    running = asyncio.ensure_future(batch(server.crew(), rows, name="exported", on_cancel="leave"))
    early = str(batch.folder / "early.jsonl")
    await completed(batch, "exported", 5)
    async with open_stored_batch("exported") as stored:
        assert await stored.export(early) == (early, 5)
        assert await stored.export(early) == (early, 5), "it is of this batch"
        with pytest.raises(pc.ConfigurationError, match="is not on record: its crew is not a stored block"):
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
    await until(lambda: server.kickoffs, "a kickoff")
    await batch(server.crew(), topics(2), name="early")
    with pytest.raises(pc.ExportError, match=r"is not from this batch: move that file. All results are in the ledger"):
        await late
    assert [line["output"] for line in batch.lines().values()] == ["on topic 0", "on topic 1"]
    batch.output.unlink()
    await batch(server.crew(), slow, name="late")
    assert [line["output"] for line in batch.lines().values()] == ["on slow"]
    assert server.kickoffs == 3


async def test_an_export_beside_an_end_has_all_lines(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(LATE)
    running = asyncio.ensure_future(batch(server.crew(), [{"topic": "slow"}, *topics(2)], name="beside"))
    await completed(batch, "beside", 2)
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


async def test_a_flow_run_has_the_name_and_no_secret(batch: Batches, echo: CrewServer):
    name = f"leads {uuid.uuid4().hex[:6]}"
    await batch(echo.crew(), topics(2), name=name)
    async with get_client() as client:
        [run] = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    assert set(run.parameters) == {"batch", "crew", "dataset", "export"}
    assert echo.token not in json.dumps(run.parameters)


async def test_a_scheduled_batch_is_named_by_its_time(batch: Batches, echo: CrewServer):
    name, export = "leads {scheduled_start:%Y-%m-%d %H:%M:%S}", str(batch.folder / "leads-{scheduled_start:%Y}.jsonl")

    @flow
    async def nightly() -> Any:
        return await batch(echo.crew(), topics(2), name=name, export=export), flow_run.scheduled_start_time

    report, moment = await nightly()
    assert report.name == f"leads {moment:%Y-%m-%d %H:%M:%S}"
    assert report.export.endswith(f"leads-{moment:%Y}.jsonl")


def test_sync_code_has_the_same(batch: Batches, echo: CrewServer):
    report = pc.run_batch(echo.crew(), topics(3), name="sync", export=str(batch.output))
    assert report.completed == 3
    plan = pc.plan_batch(echo.crew(), topics(4), name="sync", export=str(batch.output))
    assert (plan.rows, plan.done) == (4, 3)
    assert pc.plan_batch(echo.crew(), topics(4), name="sync").done == 3, "the ledger is found by the batch's name"


@pytest.mark.usefixtures("prefect_api")
async def test_names_that_no_ledger_could_keep_are_refused():
    for name in ("", " ", "x" * 201, "a\nb", "a\0b"):
        with pytest.raises(pc.ConfigurationError, match="printable name of 1 to 200"):
            await pc.arun_batch(CREW, topics(1), name=name, export="out.jsonl")


async def test_webhooks_without_a_secret_are_refused(batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "https://hooks.example.com")
    with pytest.raises(pc.ConfigurationError, match="WEBHOOK_SECRET"):
        await batch(echo.crew(), topics(1))
    assert echo.kickoffs == 0


REPEATS = script(
    {"name": "pay", "output": "paid with {{ inputs.values() | join }}", "fail": "{{ 'no ' + iban if 'bad' in topic }}"},
    inputs=["topic", "iban", "pin", "code"],
)


@pytest.mark.parametrize("is_rotated", [True, False])
async def test_a_rotated_secret_is_withheld(batch: Batches, crew_server: CrewServerFactory, is_rotated: bool):
    held, old = Held(), f"old-{uuid.uuid4().hex}"
    held.output = f"paid with {old}"
    server, new = crew_server(held), f"new-{uuid.uuid4().hex}" if is_rotated else old
    crew = server.crew(secret_inputs=["iban"])

    async def run(secret: str) -> pc.BatchReport:
        given = {"topic": "topic", "iban": lambda _: secret}
        return await batch(crew, topics(1), name=f"rotated {is_rotated}", inputs=given)

    running = asyncio.ensure_future(run(old))
    await until(lambda: server.requests["status"], "a poll")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    held.release()
    assert ((await run(new)).completed, server.kickoffs) == (1, 1)
    [line] = batch.lines().values()
    assert line["output"] == (WITHHELD if is_rotated else f"paid with {MASK}")
    everything = b"".join(path.read_bytes() for path in batch.folder.rglob("*") if path.is_file())
    assert old.encode() not in everything


async def test_no_file_of_a_batch_has_a_secret_input(batch: Batches, crew_server: CrewServerFactory):
    server, secrets = crew_server(REPEATS), {way: f"{way}-{uuid.uuid4().hex}" for way in ("iban", "pin", "code")}
    ways: dict[str, Any] = {"iban": lambda row: secrets["iban"], "code": lambda row: SecretStr(secrets["code"])}
    given = {"key": "topic", "inputs": {"topic": "topic", "pin": SecretStr(secrets["pin"]), **ways}}
    crew, rows = server.crew(secret_inputs=["iban"]), [{"topic": "tea"}, {"topic": "bad"}]
    before = os.umask(0)
    try:
        for ending in ("jsonl.gz", "jsonl"):
            report = await batch(crew, rows, export=str(batch.folder / f"out.{ending}"), **given)
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
