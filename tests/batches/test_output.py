"""The file of lines: whole ones only, none twice, in order if wanted; Parquet and other places at the end."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
from pydantic import BaseModel, SecretStr

from prefect_crew.batches.outcomes import RowEnd
from prefect_crew.batches.output import COLUMNS, HeldLines, LineFile, Output, line_of
from prefect_crew.batches.rows import RowJob
from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.models import TaskResult, TokenUsage
from prefect_crew.exceptions import ConfigurationError, OutputError
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.states import CrewState

COMPLETED = {"completed"}


def end(number: int, state: str = "completed", *, output: str = "text", data: Any = None, **facts: Any) -> RowEnd:
    now = utcnow()
    result = StoredResult(
        output=output,
        data=data,
        tasks=[TaskResult(name="t", output="x")],
        execution_time=1.5,
        usage=TokenUsage(total_tokens=7),
    )
    record = RunRecord(
        idempotency_key=f"batch/b/k{number}",
        attempt=1,
        phase=RecordPhase.ENDED,
        state=CrewState(state) if state in set(CrewState) else None,
        kickoff_id=f"run-{number}",
        kicked_off_at=now,
        ended_at=now,
        crew="c",
        crew_url="u",
        inputs_digest="d",
        owner="o",
        claimed_at=now,
        result=result if state == "completed" else None,
    )
    job = RowJob(number, number + 2, f"k{number}", {"topic": f"topic {number}", "token": "hush"}, "d")
    return RowEnd(job, state, record, **{"error": None, "data": data, **facts})


CREW = DeployedCrew(url="https://crew.test", token=SecretStr("the-token"))


def put(output: Output, *ends: RowEnd) -> None:
    for one in ends:
        output.put(one.job.number, one.job.key, line_of(one, CREW.crew))


def written(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def keys(path: Path) -> list[str]:
    return [line["key"] for line in written(path)]


def opened(path: Path, *, in_order: bool = False, stays: set[str] = COMPLETED, fresh: bool = False) -> Output:
    output = Output(str(path), beside=path)
    output.check(fresh=fresh)
    output.open(stays.__contains__, in_order=in_order)
    return output


# Lines


def test_a_line_has_all_columns_and_no_secret_input():
    line = json.loads(line_of(end(0, data={"x": 1}), CREW.crew.hiding(["token"])) or b"")
    assert list(line) == list(COLUMNS)
    assert line["inputs"] == {"topic": "topic 0", "token": "********"}
    assert (line["key"], line["state"], line["output"], line["data"]) == ("k0", "completed", "text", {"x": 1})
    assert (line["kickoff_id"], line["seconds"], line["usage"]) == ("run-0", 1.5, {"total_tokens": 7})
    assert line["tasks"] == [{"name": "t", "output": "x"}]
    assert line["error"] is None


def test_a_failed_row_has_its_reason_and_an_uncertain_one_no_line():
    line = json.loads(line_of(end(0, "failed", error="the engine is down"), CREW.crew) or b"")
    assert (line["state"], line["output"], line["error"]) == ("failed", None, "the engine is down")
    assert line_of(end(0, "uncertain", error="?"), CREW.crew) is None


@pytest.mark.parametrize(
    "text", ["", "\0 and \u2028", "ü 🙂 \u202e", "x" * 3_000_000], ids=["none", "nul", "odd", "big"]
)
def test_whatever_a_crew_writes_is_one_line_of_json(text: str):
    line = line_of(end(0, output=text, data={"nan": float("nan"), "text": text}), CREW.crew) or b""
    assert line.count(b"\n") == 1
    assert json.loads(line, parse_constant=pytest.fail)["output"] == text


# The file that grows


def test_lines_grow_and_can_be_read_meanwhile(tmp_path: Path):
    output = opened(tmp_path / "out" / "lines.jsonl")
    put(output, end(0), end(1))
    output.flush()
    assert keys(output.path) == ["k0", "k1"]
    output.close()
    output.close()


def test_a_second_call_doubles_no_line(tmp_path: Path):
    for _ in range(3):
        output = opened(tmp_path / "lines.jsonl")
        put(output, end(0), end(1), end(0))
        output.close()
    assert keys(output.path) == ["k0", "k1"]


def test_half_a_line_is_cut_off_and_written_again(tmp_path: Path):
    output = opened(tmp_path / "lines.jsonl")
    put(output, end(0), end(1))
    output.close()
    whole = output.path.read_bytes()
    output.path.write_bytes(whole[:-20])
    output = opened(tmp_path / "lines.jsonl")
    put(output, end(0), end(1))
    output.close()
    assert output.path.read_bytes() == whole


def test_lines_that_do_not_stay_make_room_for_new_ones(tmp_path: Path):
    output = opened(tmp_path / "lines.jsonl")
    put(output, end(0), end(1, "failed"), end(2), end(3, "not-started"))
    output.close()
    output = opened(tmp_path / "lines.jsonl")
    assert keys(output.path) == ["k0", "k2"]
    put(output, end(1), end(0), end(3))
    output.close()
    assert keys(output.path) == ["k0", "k2", "k1", "k3"]
    assert list(tmp_path.iterdir()) == [output.path]


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(OutputError, match="line 1 is no line of a batch"):
        opened(path)
    with pytest.raises(OutputError, match=r"is there already.*left as it is"):
        opened(path, fresh=True)
    assert path.read_text() == '{"key": "a"}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from prefect_crew.batches.output import LineFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "file = LineFile(Path(sys.argv[1]))\n"
        "for number in range(100):\n"
        "    file.add(b'%03d' % number + b'x' * 60 + b'\\n'); file.flush()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert "File too large" in ended.stderr
    content = path.read_bytes()
    assert len(content) == 1000 // 64 * 64
    assert content.endswith(b"x\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000, "only the child had the limit"


def test_what_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: .*What has ended is in the ledger"):
        opened(tmp_path / "file" / "lines.jsonl")


# In order


def test_lines_come_in_the_order_of_the_rows(tmp_path: Path):
    output = opened(tmp_path / "lines.jsonl", in_order=True)
    put(output, end(2), end(1))
    output.flush()
    assert keys(output.path) == []
    put(output, end(0))
    output.flush()
    assert keys(output.path) == ["k0", "k1", "k2"]
    put(output, end(4), end(3, "uncertain"), end(6))
    output.close()
    assert keys(output.path) == ["k0", "k1", "k2", "k4", "k6"]


def test_a_call_that_goes_on_puts_what_is_missing_in_its_place(tmp_path: Path):
    ends = [end(number) for number in range(6)]
    path = tmp_path / "lines.jsonl"
    output = opened(path, in_order=True)
    put(output, *(ends[number] for number in (0, 1, 3, 5)))
    output.close()
    assert keys(path) == ["k0", "k1", "k3", "k5"]
    before = path.read_bytes()
    output = opened(path, in_order=True)
    put(output, *ends)
    output.close()
    assert keys(path) == [f"k{number}" for number in range(6)]
    assert path.read_bytes().startswith(b"\n".join(before.split(b"\n")[:2]))


@pytest.mark.parametrize("cut", [0, 5, 200], ids=["whole", "half a line", "more than a line"])
def test_what_is_there_already_stays_as_it_is(tmp_path: Path, cut: int):
    ends = [end(number) for number in range(6)]
    path = tmp_path / "lines.jsonl"
    output = opened(path, in_order=True)
    put(output, *ends)
    output.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    output = opened(path, in_order=True)
    put(output, *ends)
    output.close()
    assert path.read_bytes() == whole


def test_a_call_that_ends_early_loses_no_line_of_an_earlier_one(tmp_path: Path):
    ends = [end(number) for number in range(6)]
    path = tmp_path / "lines.jsonl"
    output = opened(path, in_order=True)
    put(output, *ends)
    output.close()
    whole = path.read_bytes()
    output = opened(path, in_order=True)
    put(output, *ends[:2])
    output.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("last", [4, 6], ids=["the call ends early", "all rows"])
def test_a_row_that_is_uncertain_now_has_no_line_any_more(tmp_path: Path, last: int):
    path = tmp_path / "lines.jsonl"
    output = opened(path, in_order=True)
    put(output, *[end(number) for number in range(6)])
    output.close()
    output = opened(path, in_order=True)
    put(output, *[end(number, "uncertain") if number >= 2 else end(number) for number in range(last)])
    output.close()
    assert keys(path) == (["k0", "k1"] if last == 6 else ["k0", "k1", "k4", "k5"])


def test_held_lines_are_given_once(tmp_path: Path):
    held = HeldLines()
    held.put(5, b"five\n")
    held.put(7, None)
    assert held.first() == 5
    assert held.take(5) == (True, b"five\n")
    assert held.take(5) == (False, None)
    assert held.take(7) == (True, None)
    assert held.first() is None
    with LineFile(tmp_path / "x") as file:
        file.add(b"a\n")
    assert (tmp_path / "x").read_bytes() == b"a\n"


# At the end


class Place(BaseModel):
    city: str
    people: int
    area: float | None = None
    capital: bool = False
    founded: date | None = None
    seen: datetime | None = None
    kind: Literal["town", "village"] = "town"
    tags: list[str] = []


def test_parquet_has_a_column_for_each_field_of_the_type(tmp_path: Path):
    polars = pytest.importorskip("polars", reason="needs the extra `data`")
    path = tmp_path / "out.parquet"
    seen = datetime(2026, 1, 1, 12, tzinfo=UTC)
    place = Place(city="Lisbon", people=545_000, area=100.05, founded=date(1147, 10, 25), seen=seen, tags=["sea"])
    output = Output(str(path), beside=path, output_type=Place)
    output.check(fresh=True)
    output.open(COMPLETED.__contains__, in_order=False)
    put(output, end(0, data=place.model_dump(mode="json")), end(1, "failed", error="no"), end(2, data="text"))
    output.close()
    assert not path.exists()
    output.finish()
    frame = polars.read_parquet(path)
    assert frame["key"].to_list() == ["k0", "k1", "k2"]
    assert json.loads(frame["inputs"][0]) == {"topic": "topic 0", "token": "hush"}
    assert frame["error"].to_list() == [None, "no", None]
    assert json.loads(frame["data"][2]) == "text"
    first = {name: frame[f"data_{name}"][0] for name in Place.model_fields}
    assert first == {**place.model_dump(), "tags": '["sea"]'}
    assert frame["data_people"].dtype == polars.Int64
    assert frame["data_founded"].dtype == polars.Date
    assert frame["seconds"].dtype == polars.Float64


def test_parquet_of_many_and_of_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    polars = pytest.importorskip("polars", reason="needs the extra `data`")
    monkeypatch.setattr("prefect_crew.batches.output.SLICE", 3)
    for count in (0, 3, 10):
        path = tmp_path / f"{count}.parquet"
        output = opened(path)
        put(output, *(end(number) for number in range(count)))
        output.close()
        output.finish()
        assert polars.read_parquet(path)["key"].to_list() == [f"k{number}" for number in range(count)]


def test_parquet_without_the_extra_is_refused_before_anything_is_bought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ConfigurationError, match=r"needs polars: pip install 'prefect-crew\[data\]'.*Nothing was"):
        Output(str(tmp_path / "out.parquet"), beside=tmp_path / "x")


def test_another_place_gets_the_lines_at_the_end(tmp_path: Path):
    output = Output("memory://results/out.jsonl", beside=tmp_path / "ledger.db")
    output.check(fresh=True)
    output.open(COMPLETED.__contains__, in_order=False)
    put(output, end(0), end(1))
    output.close()
    output.finish()
    with fsspec.open("memory://results/out.jsonl") as file:
        assert file.read() == output.path.read_bytes()


def test_a_compressed_output_is_compressed(tmp_path: Path):
    output = opened(tmp_path / "out.jsonl.gz")
    put(output, end(0), end(1))
    output.close()
    output.finish()
    with gzip.open(tmp_path / "out.jsonl.gz") as file:
        assert [json.loads(line)["key"] for line in file] == ["k0", "k1"]


@pytest.mark.parametrize("output", ["nonsense://x/out.jsonl", "https://example.com/out.jsonl"])
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_bought(tmp_path: Path, output: str):
    with pytest.raises(ConfigurationError, match="Nothing was started"):
        Output(output, beside=tmp_path / "ledger.db")


def test_a_place_that_fails_at_the_end_keeps_the_lines(tmp_path: Path):
    output = Output(str(tmp_path / "out.jsonl.gz"), beside=tmp_path / "x")
    output.check(fresh=True)
    output.open(COMPLETED.__contains__, in_order=False)
    put(output, end(0))
    output.close()
    (tmp_path / ".out.jsonl.gz.new").mkdir()
    with pytest.raises(OutputError, match=r"Its lines are in .*out\.jsonl\.gz\.lines\.jsonl; the same call again"):
        output.finish()
    assert keys(output.path) == ["k0"]
