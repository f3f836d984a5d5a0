"""Data sets of every kind, and what is said of those that cannot be read: the file and the line."""

from __future__ import annotations

import asyncio
import bz2
import csv
import gzip
import io
import json
import lzma
import sqlite3
import sys
import time
import traceback
import tracemalloc
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import fsspec
import httpx
import pytest
from pydantic import create_model
from sqlalchemy import create_engine, select
from sqlalchemy import text as text_of
from sqlalchemy.exc import StatementError

from prefect_crew import ConfigurationError
from prefect_crew.batches import dataset as dataset_module
from prefect_crew.batches.dataset import Dataset, Row, Spool, aopen_dataset, open_dataset, shown_address
from prefect_crew.client.encoding import encode_inputs
from prefect_crew.exceptions import DatasetError

CSV = 'topic,place\ntea,"Lisbon, ""old"" town"\ncoffee,São Paulo\n'
ROWS = [{"topic": "tea", "place": 'Lisbon, "old" town'}, {"topic": "coffee", "place": "São Paulo"}]


def rows_of(dataset: Dataset) -> Iterator[Row]:
    for row in dataset.rows():
        if row.fault is not None:
            raise DatasetError(f"{row.fault}.", source=dataset.name, line=row.line)
        yield row


def values(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(row.values) for row in rows_of(dataset)]


def zipped(*names: str, content: str = CSV) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "" if name.endswith("/") else content)
    return file.getvalue()


JSONL = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS)
FORMATS = {
    "rows.csv": CSV.encode(),
    "rows.tsv": 'topic\tplace\ntea\t"Lisbon, ""old"" town"\ncoffee\tSão Paulo\n'.encode(),
    "rows.jsonl": JSONL.encode(),
    "rows.ndjson": f"\n{JSONL}\n\n".encode(),
    "rows.json": json.dumps(ROWS, ensure_ascii=False, indent=2).encode(),
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "rows.csv.bz2": bz2.compress(CSV.encode()),
    "rows.csv.xz": lzma.compress(CSV.encode()),
    "rows.csv.zip": zipped("rows.csv"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_rows_again_and_again(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    dataset = open_dataset(path)
    assert values(dataset) == values(dataset) == values(open_dataset(f"file://{path}")) == ROWS


def test_parquet(tmp_path: Path):
    polars = pytest.importorskip("polars", reason="needs the extra `data`")
    rows = [{"topic": f"topic {number}", "day": date(2026, 1, 1), "count": number} for number in range(12_000)]
    polars.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    assert values(open_dataset(tmp_path / "rows.parquet")) == rows


FRAMES: dict[str, Callable[[Any], Any]] = {
    "polars": lambda polars: polars.DataFrame(COLUMNS),
    "polars lazy": lambda polars: polars.DataFrame(COLUMNS).lazy(),
    "pandas": lambda pandas: pandas.DataFrame({**COLUMNS, "count": [1, float("nan")]}),
    "pyarrow": lambda pyarrow: pyarrow.table(COLUMNS),
    "pyarrow batch": lambda pyarrow: pyarrow.table(COLUMNS).to_batches()[0],
}
COLUMNS = {"topic": ["tea", None], "count": [1, None]}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_gives_its_rows_again_and_again(kind: str):
    dataset = open_dataset(FRAMES[kind](library(kind.partition(" ")[0])))
    assert values(dataset) == values(dataset) == [{"topic": "tea", "count": 1}, {"topic": None, "count": None}]


def test_a_column_that_a_frame_has_twice_is_refused():
    pandas, pyarrow = library("pandas"), library("pyarrow")
    frame = pandas.DataFrame(COLUMNS)
    assert values(open_dataset(frame.iloc[:0])) == []
    doubled = pyarrow.Table.from_arrays([[1], [2]], names=["topic", "topic"])
    for twice in (pandas.concat([frame, frame], axis="columns"), doubled):
        with pytest.raises(DatasetError, match="'topic' appear twice"):
            values(open_dataset(twice))


def test_what_pandas_has_in_its_cells_can_be_sent():
    pandas, numpy = library("pandas"), library("numpy")
    days = pandas.to_datetime(["2026-01-01", None])
    columns = {
        "count": (pandas.array([1, None], dtype="Int64"), "1", None),
        "day": (days, "2026-01-01T00:00:00", None),
        "kind": (pandas.Categorical(["a", None]), "a", None),
        "list": ([numpy.array(["a", "b"], dtype=object), numpy.array([1.5, 2])], '["a","b"]', "[1.5,2.0]"),
        "nested": ([{"yes": numpy.bool_(True), "number": numpy.int64(1)}, None], '{"yes":true,"number":1}', None),
        7: ([True, False], "true", "false"),
    }
    rows = values(open_dataset(pandas.DataFrame({name: cells for name, (cells, *_) in columns.items()})))
    for at, row in enumerate(rows, 1):
        assert encode_inputs(row) == {str(name): sent[at] for name, sent in columns.items() if sent[at] is not None}
    assert len(rows) == 2
    with pytest.raises(ConfigurationError, match=r"'days' holds a value of type DatetimeIndex, which cannot be sent"):
        encode_inputs({"days": days})


def test_an_iterator_is_kept_for_the_second_reading():
    rows = [{"price": Decimal("1.10"), "tags": ("a", "b")}, {"price": None}]
    dataset = open_dataset(iter(rows))
    assert values(dataset) == values(dataset) == rows
    # Two readers at once do not disturb each other.
    one, two = rows_of(dataset), rows_of(dataset)
    assert [next(one), next(two), next(two), next(one)] == [Row(1, rows[0])] * 2 + [Row(2, rows[1])] * 2


def test_lines_are_those_of_the_file(tmp_path: Path):
    (tmp_path / "rows.csv").write_text('topic,text\ntea,"two\nlines"\n\ncoffee,one\n')
    assert [row.line for row in rows_of(open_dataset(tmp_path / "rows.csv"))] == [2, 5]
    (tmp_path / "rows.json").write_text('[\n{"a": 1},\n\n{"a":\n2}, {"a": 3}\n]')
    assert [row.line for row in rows_of(open_dataset(tmp_path / "rows.json"))] == [1, 2, 3], "the rows' numbers"


def test_encodings_are_named_and_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV.encode("utf-8-sig"))
    assert values(open_dataset(path)) == ROWS
    for encoding in ("latin-1", "utf-16", "utf-32-le"):
        path.write_bytes(CSV.encode(encoding))
        assert values(open_dataset(path, encoding=encoding)) == ROWS


def test_fields_may_be_huge(tmp_path: Path):
    document = "word " * 600_000
    (tmp_path / "rows.csv").write_text(f'topic,text\ntea,"{document}"\n')
    assert values(open_dataset(tmp_path / "rows.csv"))[0]["text"] == document
    (tmp_path / "rows.json").write_text(json.dumps([{"text": document}, {"text": "short"}]))
    assert [row["text"] for row in values(open_dataset(tmp_path / "rows.json"))] == [document, "short"]


def test_files_are_read_in_bounded_memory(tmp_path: Path):
    row = {"topic": "tea", "text": "x" * 1000}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 10_000))
    (tmp_path / "rows.csv").write_text("topic,text\n" + f"tea,{'x' * 1000}\n" * 10_000)
    for name in ("rows.jsonl", "rows.csv"):
        tracemalloc.start()
        assert sum(1 for _ in rows_of(open_dataset(tmp_path / name))) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6, name


def test_any_fsspec_address(tmp_path: Path):
    with fsspec.open("memory://batches/rows.csv.gz", "wb", compression="gzip") as file:
        file.write(CSV.encode())
    assert values(open_dataset("memory://batches/rows.csv.gz")) == ROWS
    (tmp_path / "many.zip").write_bytes(zipped("inner/rows.jsonl", content=JSONL))
    assert values(open_dataset(f"zip://inner/rows.jsonl::{tmp_path / 'many.zip'}")) == ROWS


@pytest.mark.parametrize("address", ["{folder}/rows.csv.zip", "{server}/rows.csv.zip", "memory://zip/rows.csv.zip"])
def test_an_archive_of_one_file_is_its_rows_and_of_more_is_refused(tmp_path: Path, httpserver: Any, address: str):
    def place(content: bytes) -> Dataset:
        (tmp_path / "rows.csv.zip").write_bytes(content)
        with fsspec.open("memory://zip/rows.csv.zip", "wb") as file:
            file.write(content)
        return open_dataset(address.format(folder=tmp_path, server=httpserver({"/rows.csv.zip": content})))

    assert values(place(zipped("rows/", "rows/rows.csv", "__MACOSX/rows/._rows.csv"))) == ROWS
    for names in ((), ("a.csv", "b.csv")):
        with pytest.raises(DatasetError, match=rf"archive of {len(names)} files.*Give zip://FILE::ARCHIVE"):
            values(place(zipped(*names)))


def test_what_lies_elsewhere_is_fetched_once(httpserver: Any):
    url = httpserver({"/rows.csv.gz": gzip.compress(CSV.encode())})
    dataset = open_dataset(f"{url}/rows.csv.gz?signature=secret")
    assert values(dataset) == values(dataset) == ROWS
    assert httpserver.requests == ["/rows.csv.gz?signature=secret"]
    assert "secret" not in dataset.name
    with pytest.raises(DatasetError, match=r"none\.csv: cannot be fetched: HTTP 404"):
        values(open_dataset(f"{url}/none.csv"))


def test_no_log_of_a_fetch_shows_what_is_secret_in_the_address(httpserver: Any, caplog: pytest.LogCaptureFixture):
    url = httpserver({"/rows.csv": CSV.encode()})
    with caplog.at_level("INFO", logger="httpx"):
        assert values(open_dataset(f"{url.replace('://', '://user:hunter2@')}/rows.csv?sig=hunter3")) == ROWS
        httpx.get(f"{url}/rows.csv?page=2")
    first, second = (record.getMessage() for record in caplog.records if record.name == "httpx")
    assert f'GET {url}/rows.csv "HTTP' in first
    assert "rows.csv?page=2" in second


@pytest.mark.parametrize("kind", [FileNotFoundError, ValueError, Exception])
def test_no_error_of_a_library_shows_a_secret(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]):
    def refuse(address: str, *_: Any, **__: Any) -> Any:
        raise kind(404, f"404, url={address}")

    monkeypatch.setattr(fsspec, "open", refuse)
    address = "simplecache::http://user:hunter2@h.test/none.csv?sig=hunter3"
    with pytest.raises(DatasetError, match=rf"none\.csv: cannot be .*{kind.__name__}\.") as caught:
        values(open_dataset(address))
    assert "hunter" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(DatasetError, match="404, url=memory:"):
        values(open_dataset("memory://x/none.csv"))


WRONG: dict[str, tuple[str, bytes, str]] = {
    "empty csv": ("x.csv", b"", "is empty: it has no header"),
    "only blank lines": ("x.csv", b"\n", "is empty"),
    "doubled column": ("x.csv", b"a,b,a\n1,2,3\n", r"line 1: the columns 'a' appear twice"),
    "too few fields": ("x.csv", b"a,b\n1,2\n3\n", r"line 3: has 1 fields, the header has 2"),
    "too many fields": ("x.csv", b"a,b\n1,2,3\n", r"line 2: has 3 fields"),
    "ragged after a long row": ("x.csv", b'a,b\n1,"x\ny"\n3\n', r"line 4: has 1 fields"),
    "open quote": ("x.csv", b'a,b\n1,2\n3,"x\n4,5\n', r"line 3: is not CSV: a quote that opens in this row"),
    "text after a quote": ("x.csv", b'a,b\n1,"x"y\n', r"line 2: is not CSV"),
    "other encoding": ("x.csv", "a,b\n1,2\nü,3\n".encode("latin-1"), r"line 3: the bytes fc are not utf-8"),
    "encoding in mid-line": ("x.jsonl", b'{"a": 1}\n{"a": "x\xff"}\n', r"line 2: the bytes ff are not utf-8"),
    "no json": ("x.jsonl", b'{"a": 1}\n{"a": \n', r"line 2: is not JSON"),
    "no object": ("x.jsonl", b'{"a": 1}\n[1]\n', r"line 2: is of type list, not a mapping"),
    "empty json": ("x.json", b" \n ", r"line 2: is not JSON: Expecting value"),
    "a number": ("x.json", b"7", "is not a JSON array of objects"),
    "array of numbers": ("x.json", b"[\n{},\n1]", r"line 2: is of type int, not a mapping"),
    "cut off": ("x.json", b'[{"a": 1},\n{"a": "x', r"line 2: is not JSON: Unterminated string"),
    "json lines": ("x.json", b'{"a": 1}\n{"a": 2}', r"line 2: .*Is it JSON Lines\?"),
    "no gzip": ("x.csv.gz", b"a,b\n1,2\n", "cannot be read: BadGzipFile"),
    "half a gzip": ("x.csv.gz", gzip.compress(CSV.encode() * 99)[:60], "cannot be read: EOFError"),
    "half an xz": ("x.csv.xz", lzma.compress(CSV.encode() * 99)[:60], "cannot be read: EOFError"),
    "no zip": ("x.csv.zip", b"a,b", "cannot be read: BadZipFile"),
    "no bzip": ("x.csv.bz2", b"a,b\n1,2", "cannot be read: OSError"),
    "no xz": ("x.csv.xz", b"a,b\n1,2", "cannot be read: LZMAError"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, what: str):
    name, content, message = WRONG[what]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        values(open_dataset(path))
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("Nothing of this data set was started.")


def test_one_row_that_has_no_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset_module, "ROW_LIMIT", 10_000)
    (tmp_path / "x.csv").write_text('a,b\n1,2\n3,"' + "x\n" * 20_000)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 40_000)
    for name, line in (("x.csv", 3), ("x.jsonl", 2)):
        with pytest.raises(DatasetError, match=r"a quote that opens .* never closed|a line without an end") as caught:
            values(open_dataset(tmp_path / name))
        assert caught.value.line == line


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rows.xlsx", "the format is not known from the file ending '.xlsx'"),
        ("rows", "the format is not known from the file ending ''"),
        ({"a": 1}, "is of type dict, which is not a data set: give a path"),
        (7, "is of type int, which is not a data set"),
        (b"a,b", "is of type bytes, which is not a data set"),
    ],
)
def test_what_is_no_data_set_is_refused_at_once(source: Any, message: str):
    with pytest.raises(DatasetError, match=message):
        open_dataset(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none/rows.csv", "cannot be opened: No such file"),
        pytest.param(
            *("none/rows.parquet", "cannot be opened: No such file"),
            marks=pytest.mark.skipif(find_spec("polars") is None, reason="needs the extra `data`"),
        ),
        ("nonsense://x/rows.csv", "cannot be read: ValueError: Protocol not known"),
        ("http://127.0.0.1:9/rows.csv", "cannot be fetched"),
        (["a", "b"], "line 1: is of type str, not a mapping"),
        ("folder.csv", "cannot be opened"),
        ("x.csv", "there is no encoding 'klingon'"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, message: str):
    monkeypatch.chdir(tmp_path)
    Path("folder.csv").mkdir()
    Path("x.csv").write_text(CSV)
    with pytest.raises(DatasetError, match=message):
        values(open_dataset(source, encoding="klingon" if source == "x.csv" else "utf-8"))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_file_that_changes_between_two_readings_or_within_one_is_refused(tmp_path: Path, count: int):
    path = tmp_path / "rows.csv"
    path.write_text(CSV)
    dataset = open_dataset(path)
    rows = dataset.rows()
    assert len(list(islice(rows, count)) if count else values(dataset)) == (count or len(ROWS))
    path.write_text(CSV + "late,row\n")
    with pytest.raises(DatasetError, match="changed during the read"):
        list(rows)


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("x.csv", "a,b\n1,2\n3\n8,9\n", [None, "has 1 fields, the header has 2", None]),
        ("x.csv", 'a,b\n1,2\n7,"x"y\n8,9\n', [None, "is not CSV: ',' expected after '\"'", None]),
        ("x.jsonl", '{"a": 1}\n[1]\n{"a": 2}\n', [None, "is of type list, not a mapping", None]),
        ("x.jsonl", '{"a": ', ["is not JSON: Expecting value: line 1 column 6 (char 5)"]),
        ("x.json", '[{"a": 1}, 7, {"a": 2}]', [None, "is of type int, not a mapping", None]),
    ],
)
def test_a_line_that_is_no_row_is_a_fault_of_its_own(tmp_path: Path, name: str, content: str, faults: list[str | None]):
    (tmp_path / name).write_text(content)
    assert [row.fault for row in open_dataset(tmp_path / name).rows()] == faults


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


@pytest.mark.parametrize(("name", "sign"), [("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", ",")])
def test_another_delimiter_is_seen_and_said(tmp_path: Path, name: str, sign: str):
    path, column = tmp_path / name, f"id{sign}text"
    path.write_text(f"{column}\n1{sign}tea\n")
    with pytest.raises(DatasetError) as caught:
        values(open_dataset(path))
    remedy = f"If its fields are separated by {sign!r}, give delimiter={sign!r}"
    assert f"has one column, {column!r}. {remedy}" in str(caught.value)
    assert values(open_dataset(path, delimiter=sign))[0] == {"id": "1", "text": "tea"}
    assert list(values(open_dataset(path, delimiter="#"))[0]) == [column], "who says so means one column"


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path: Path, delimiter: str):
    with pytest.raises(DatasetError, match="cannot have the delimiter"):
        open_dataset(tmp_path / "x.csv", delimiter=delimiter)


def test_the_limit_of_other_readers_of_csv_stays_as_it_is(tmp_path: Path):
    path, before = tmp_path / "x.csv", csv.field_size_limit()
    path.write_text(f"a\n{'x' * (before + 1)}\ny\n")
    for _ in open_dataset(path).rows():
        assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (create_model("Model")(), "is of type Model, not a mapping: give its model_dump()"),
        (make_dataclass("Data", [])(), "is of type Data, not a mapping: give its dataclasses.asdict()"),
        (namedtuple("Named", "text")("tea"), "is of type Named, not a mapping: give its _asdict()"),
        (("tea",), "is of type tuple, not a mapping"),
    ],
    ids=["pydantic", "dataclass", "namedtuple", "tuple"],
)
def test_a_row_that_is_no_mapping_is_said_with_what_to_give(row: Any, remedy: str):
    assert [found.fault for found in open_dataset([row]).rows()] == [remedy]


def test_parts_of_many_rows_are_no_rows():
    pandas = pytest.importorskip("pandas", reason="needs the extra `data`")
    with pytest.raises(DatasetError, match=r"is of type TextFileReader.*read_csv without chunksize"):
        open_dataset(pandas.read_csv(io.StringIO("a\n1\n"), chunksize=1))
    (row,) = open_dataset([pandas.DataFrame({"a": [1, 2]})]).rows()
    assert row.fault is not None
    assert row.fault.startswith("is of type DataFrame, not a mapping: it is a part of many rows, so give the parts")


TEA = "SELECT 'tea' AS topic, NULL AS count"


def sqlite_cursor(query: str = TEA) -> Any:
    database = sqlite3.connect("")
    database.row_factory = sqlite3.Row
    return database.execute(query)


def sqlalchemy_result(query: str = TEA) -> Any:
    return create_engine("sqlite://").connect().execute(text_of(query))


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"needs {name}")


def mapping_cursor() -> Any:
    cursor = sqlite_cursor()
    cursor.row_factory = lambda cursor, row: {"count": row[1], "topic": row[0]}
    return cursor


ONCE: dict[str, Callable[[], Any]] = {
    "DB-API": sqlite_cursor,
    "DB-API, mappings": mapping_cursor,
    "SQLAlchemy": sqlalchemy_result,
    "SQLAlchemy, mappings": lambda: sqlalchemy_result().mappings(),
    "rows of sqlite3": lambda: list(sqlite_cursor()),
    "rows of SQLAlchemy": lambda: sqlalchemy_result().all(),
    "DuckDB relation": lambda: library("duckdb").sql(TEA),
    "DuckDB cursor": lambda: library("duckdb").connect().execute(TEA),
    "Arrow reader": lambda: library("pyarrow").table({"topic": ["tea"], "count": [None]}).to_reader(),
}


@pytest.mark.parametrize("kind", ONCE)
async def test_source_that_is_read_once_gives_its_rows_again(kind: str):
    for dataset in (open_dataset(ONCE[kind]()), await aopen_dataset(ONCE[kind]())):
        assert values(dataset) == values(dataset) == [{"topic": "tea", "count": None}]
        one, two = rows_of(dataset), rows_of(dataset)
        assert next(one) == next(two)


def test_arrow_stream_is_read_by_polars_without_pyarrow(monkeypatch: pytest.MonkeyPatch):
    polars = pytest.importorskip("polars", reason="needs the extra `data`")

    class Stream:
        __arrow_c_stream__ = staticmethod(polars.DataFrame(COLUMNS).__arrow_c_stream__)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "import_module", Mock(side_effect=ImportError))
        assert values(open_dataset(Stream())) == [{"topic": "tea", "count": 1}, {"topic": None, "count": None}]
        patch.setitem(sys.modules, "polars", None)
        with pytest.raises(DatasetError, match=r"Stream: needs polars: pip install 'prefect-crew\[data\]'"):
            open_dataset(Stream())


def slow_cursor(pauses: dict[int, float]) -> Any:
    """Return a cursor that any thread may read. Its rows are 1 to 6000, and some take seconds."""

    def slow(number: int) -> int:
        time.sleep(pauses.get(number, 0.0))
        return number

    database = sqlite3.connect("", check_same_thread=False)
    database.create_function("slow", 1, slow)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 6000) SELECT"
    return database.execute(f"{numbers} slow(i) AS i FROM n")


async def test_slow_cursor_does_not_stop_the_event_loop():
    beats: list[float] = []

    async def beat() -> None:
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.02)

    heart = asyncio.create_task(beat())
    dataset = await aopen_dataset(slow_cursor({2: 2.0, 5500: 2.0}))
    heart.cancel()
    assert max(later - earlier for earlier, later in pairwise(beats)) < 1.5
    assert sum(1 for _ in dataset.rows()) == 6000


async def test_cancelled_read_of_a_cursor_ends_with_its_part():
    cursor = slow_cursor({2: 0.5, 5500: 60.0})
    reading = asyncio.create_task(aopen_dataset(cursor))
    await asyncio.sleep(0.1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    cursor.connection.close()


def test_values_of_a_cursor_keep_their_types():
    day = {"at": datetime(2026, 1, 2, 3, tzinfo=UTC), "price": Decimal("1.10"), "raw": memoryview(b"\0\xff")}
    spool = Spool("cursor")
    spool.fill([*day, "id"], [[(*day.values(), UUID(int=7))]])
    (row,) = spool.rows()
    assert row.values == {**day, "raw": b"\0\xff", "id": UUID(int=7)}


def test_spooled_rows_stay_out_of_memory_and_go_at_the_end():
    query = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000) SELECT i, ? AS text FROM n"
    cursor = sqlite3.connect("").execute(query, ("x" * 500,))
    tracemalloc.start()
    rows = sum(1 for _ in open_dataset(cursor).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 30_000
    assert peak < 12_000_000


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (lambda: sqlite_cursor("CREATE TABLE t (a)"), "sqlite3 Cursor: has no result: execute a query that"),
        (lambda: sqlite_cursor("SELECT 1 AS a, 2 AS a"), "the columns 'a' appear twice"),
        (lambda: sqlalchemy_result("SELECT 1 AS a, 2 AS a"), "the columns 'a' appear twice"),
        (lambda: sqlalchemy_result("SELECT 1 AS a, 2 AS a").all(), "line 1: has the columns 'a' twice"),
        (lambda: sqlalchemy_result("CREATE TABLE t (a)"), "cannot be read: ResourceClosedError"),
        (lambda: text_of("SELECT 1"), "is of type TextClause.*names no database.*sql://BLOCK"),
        (lambda: select(text_of("1")), "is of type Select.*names no database"),
        (lambda: pytest.importorskip("pyarrow").chunked_array([[1]]), "cannot be read: ArrowInvalid"),
    ],
)
def test_source_without_rows_is_refused(source: Callable[[], Any], problem: str):
    with pytest.raises(DatasetError, match=problem):
        values(open_dataset(source()))


def test_cursor_that_fails_on_the_way_names_no_value():
    error = StatementError("broken", "SELECT ?", {"pin": "sesame-open"}, ValueError("the connection is gone"))
    cursor: Any = type("Cursor", (), {"description": (("a",),), "fetchmany": Mock(side_effect=error)})
    with pytest.raises(DatasetError, match=r"cannot be read: ValueError: the connection is gone\.") as caught:
        open_dataset(cursor())
    assert "sesame" not in str(caught.value)
