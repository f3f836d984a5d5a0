"""Data sets of every kind, and the messages about those that cannot be read: with the file and the line."""

import bz2
import gzip
import json
import lzma
import sqlite3
import traceback
import tracemalloc
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from sqlalchemy import create_engine
from sqlalchemy import text as text_of

from prefect_crew import ConfigurationError
from prefect_crew.batches import dataset as dataset_module
from prefect_crew.batches.dataset import Dataset, Row, open_dataset, shown_address
from prefect_crew.client.encoding import encode_inputs
from prefect_crew.exceptions import DatasetError

CSV = 'topic,place\ntea,"Lisbon, ""old"" town"\ncoffee,São Paulo\n'
ROWS = [{"topic": "tea", "place": 'Lisbon, "old" town'}, {"topic": "coffee", "place": "São Paulo"}]


def values(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(row.values) for row in dataset.rows()]


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"needs {name}")


# Files


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
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_rows_again(tmp_path: Path, name: str):
    for address in (str(tmp_path / name), f"file://{tmp_path / name}", f"memory://batches/{name}"):
        with fsspec.open(address, "wb") as file:
            file.write(FORMATS[name])
        dataset = open_dataset(address)
        assert values(dataset) == values(dataset) == ROWS


def test_parquet_of_many_parts_gives_all_rows(tmp_path: Path):
    rows = [{"topic": f"topic {number}", "day": date(2026, 1, 1), "count": number} for number in range(12_000)]
    library("polars").DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    assert values(open_dataset(tmp_path / "rows.parquet")) == rows


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV.encode("utf-8-sig"))
    assert values(open_dataset(path)) == ROWS


def test_a_field_may_be_huge(tmp_path: Path):
    path, document = tmp_path / "x.csv", "word " * 600_000
    path.write_text(f"a\n{document}\ny\n")
    assert [row.values["a"] for row in open_dataset(path).rows()] == [document, "y"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_rows_are_read_in_bounded_memory(tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "x.csv":
        path.write_text("topic,text\n" + f"tea,{'x' * 1000}\n" * 10_000)
    else:
        path.write_text(f"{json.dumps({'topic': 'tea', 'text': 'x' * 1000})}\n" * 10_000)
    tracemalloc.start()
    count = sum(1 for _ in open_dataset(path).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 4e6


@pytest.mark.parametrize("count", [0, 1, 2])
def test_file_that_changes_between_or_within_readings_is_refused(tmp_path: Path, count: int):
    path = tmp_path / "rows.csv"
    path.write_text(CSV)
    dataset = open_dataset(path)
    rows = dataset.rows()
    assert len(list(islice(rows, count)) if count else values(dataset)) == (count or len(ROWS))
    path.write_text(CSV + "late,row\n")
    with pytest.raises(DatasetError, match="changed during the read"):
        list(rows)


def test_remote_file_is_fetched_once_and_no_log_has_its_secrets(httpserver: Any, caplog: pytest.LogCaptureFixture):
    url = httpserver({"/rows.csv.gz": gzip.compress(CSV.encode())})
    dataset = open_dataset(f"{url.replace('://', '://user:hunter2@')}/rows.csv.gz?signature=hunter3")
    with caplog.at_level("DEBUG"):
        assert values(dataset) == values(dataset) == ROWS
    assert httpserver.requests == ["/rows.csv.gz?signature=hunter3"]
    assert httpserver.users == ["user:hunter2"]
    assert dataset.name == f"{url}/rows.csv.gz"
    assert "hunter" not in caplog.text
    with pytest.raises(DatasetError, match=r"none\.csv: cannot be read: HTTP 404"):
        values(open_dataset(f"{url}/none.csv"))


@pytest.mark.parametrize("kind", [FileNotFoundError, ValueError])
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
def test_address_is_shown_without_its_secrets(address: str, shown: str):
    assert shown_address(address) == shown


UNREADABLE: dict[str, tuple[str, bytes | None, str]] = {
    "no file": ("none/rows.csv", None, "cannot be read: No such file"),
    "no parquet": ("none/rows.parquet", None, "cannot be read: .*No such file"),
    "folder": ("folder.csv", None, "cannot be read"),
    "no protocol": ("nonsense://x/rows.csv", None, "cannot be read: ValueError: Protocol not known"),
    "no server": ("http://127.0.0.1:9/rows.csv", None, "cannot be read: URLError"),
    "empty csv": ("x.csv", b"", "is empty: it has no header"),
    "only blank lines": ("x.csv", b"\n", "is empty"),
    "doubled column": ("x.csv", b"a,b,a\n1,2,3\n", r"line 1: the columns 'a' appear twice"),
    "open quote": ("x.csv", b'a,b\n1,2\n3,"x\n4,5\n', r"line 3: is not CSV: a quote that opens in this row"),
    "open quote in the header": ("x.csv", b'"a,b\n1,2\n', r"line 1: is not CSV: unexpected end of data"),
    "two delimiters": ("x.csv", b"id;price, net\n1;2,50\n", r"line 1: both ',' and ';' may separate"),
    "none of two delimiters": ("x.csv", b"id;price, net\n1;2\n3,4\n", r"line 1: both ',' and ';' may"),
    "UTF-16": ("x.csv", CSV.encode("utf-16"), "line 1: holds a NUL, as UTF-16 does. Save it as UTF-8"),
    "UTF-16 without a mark": ("x.csv", CSV.encode("utf-16-le"), "line 1: holds a NUL"),
    "UTF-16 of JSON": ("x.jsonl", JSONL.encode("utf-16-be"), "line 1: holds a NUL"),
    "other encoding": ("x.csv", "a,b\n1,2\nü,3\n".encode("latin-1"), r"line 3: the bytes fc are not UTF-8"),
    "encoding in mid-line": ("x.jsonl", b'{"a": 1}\n{"a": "x\xff"}\n', r"line 2: the bytes ff are not UTF-8"),
    "empty json": ("x.json", b" \n ", r"line 2: is not JSON: Expecting value"),
    "a number": ("x.json", b"7", "is not a JSON array of objects"),
    "cut off": ("x.json", b'[{"a": 1},\n{"a": "x', r"line 2: is not JSON: Unterminated string"),
    "json lines": ("x.json", b'{"a": 1}\n{"a": 2}', r"line 2: .*Is it JSON Lines\?"),
    "no gzip": ("x.csv.gz", b"a,b\n1,2\n", "cannot be read: BadGzipFile"),
    "half a gzip": ("x.csv.gz", gzip.compress(CSV.encode() * 99)[:60], "cannot be read: EOFError"),
    "half an xz": ("x.csv.xz", lzma.compress(CSV.encode() * 99)[:60], "cannot be read: EOFError"),
    "no bzip": ("x.csv.bz2", b"a,b\n1,2", "cannot be read: OSError"),
    "no xz": ("x.csv.xz", b"a,b\n1,2", "cannot be read: LZMAError"),
}


@pytest.mark.parametrize("problem", UNREADABLE)
def test_unreadable_file_is_reported_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str):
    address, content, message = UNREADABLE[problem]
    if address.endswith("parquet"):
        library("polars")
    monkeypatch.chdir(tmp_path)
    Path("folder.csv").mkdir()
    if content is not None:
        Path(address).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        values(open_dataset(address))
    assert str(caught.value).startswith(address)
    assert str(caught.value).endswith("Nothing of this data set was started.")


def test_row_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset_module, "FIELD_LIMIT", 10_000)
    (tmp_path / "x.csv").write_text('a,b\n1,2\n3,"' + "x\n" * 20_000)
    with pytest.raises(DatasetError, match=r"a quote that opens .* never closed") as caught:
        values(open_dataset(tmp_path / "x.csv"))
    assert caught.value.line == 3


@pytest.mark.parametrize(("name", "sign"), [("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", ",")])
def test_another_delimiter_is_read_from_the_header(tmp_path: Path, name: str, sign: str):
    path, column = tmp_path / name, f"id{sign}text"
    path.write_text(f"{column}\n1{sign}tea\n", encoding="utf-8-sig")  # as Excel writes it
    assert values(open_dataset(path))[0] == {"id": "1", "text": "tea"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('id;"city, country"\n1;"Lisbon, Portugal"\n2;Rome\n', [("1", "Lisbon, Portugal"), ("2", "Rome")]),
        ('"id";"price, net"\n1;2,50\n2;3,00', [("1", "2,50"), ("2", "3,00")]),
        ('name,"notes; remarks"\nAda,"x; y"\n', [("Ada", "x; y")]),
        ("topic,tone (dry|warm)\ntea,dry\n", [("tea", "dry")]),
        ("id\tcity, country\n1\tRome\n", [("1", "Rome")]),
        ('id;"a, b"\n1;"2,\n' + "x\n" * 30 + '"\n', [("1", "2,\n" + "x\n" * 30)]),
        ('id;x\n1;"x"y\n2;"x, y"', [("2", "x, y")]),
        ('"topic, or title"\ntea\nrye', [("tea",), ("rye",)]),
        ("a,b", []),
        ("a,b\n", []),
    ],
)
def test_the_delimiter_is_what_the_first_lines_fit(
    tmp_path: Path, content: str, rows: list[tuple[str, ...]], encoding: str
):
    (tmp_path / "x.csv").write_text(content, encoding=encoding)
    found = [row for row in open_dataset(tmp_path / "x.csv").rows() if row.fault is None]
    assert [tuple(row.values.values()) for row in found] == rows


def test_the_ending_of_a_file_with_tabs_tells_its_delimiter(tmp_path: Path):
    (tmp_path / "x.tsv").write_text("name\tcity, country\nAda\tParis, France\n")
    assert values(open_dataset(tmp_path / "x.tsv")) == [{"name": "Ada", "city, country": "Paris, France"}]


def test_lines_are_counted_after_a_header_of_two(tmp_path: Path):
    (tmp_path / "x.csv").write_text('"a\nb",c\n1,2\n3\n')
    assert [row.line for row in open_dataset(tmp_path / "x.csv").rows()] == [3, 4]


# Lines that hold no row


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("x.csv", 'a,b\ntea,"two\nlines"\n\nrye,one\n', [(2, None), (5, None)]),
        ("x.csv", "a,b\n1,2\n3\n8,9\n", [(2, None), (3, "has 1 fields, the header has 2"), (4, None)]),
        ("x.csv", 'a,b\n1,"x\ny"\n3,4,5\n', [(2, None), (4, "has 3 fields, the header has 2")]),
        ("x.csv", 'a,b\n1,2\n7,"x"y\n8,9\n', [(2, None), (3, "is not CSV: ',' expected after '\"'"), (4, None)]),
        ("x.jsonl", '{"a": 1}\n[1]\n{"a": 2}\n', [(1, None), (2, "is of type list, not a mapping"), (3, None)]),
        ("x.jsonl", '\n{"a": ', [(2, "is not JSON: Expecting value: line 1 column 6 (char 5)")]),
        # An array has no lines: these are the numbers of its rows.
        ("x.json", '[\n{"a": 1},\n\n{"a":\n2}, 7]', [(1, None), (2, None), (3, "is of type int, not a mapping")]),
    ],
)
def test_line_without_a_row_has_a_fault(tmp_path: Path, name: str, content: str, faults: list[tuple[int, str | None]]):
    (tmp_path / name).write_text(content)
    assert [(row.line, row.fault) for row in open_dataset(tmp_path / name).rows()] == faults


def test_row_that_is_no_mapping_has_a_fault():
    assert [bad.fault for bad in open_dataset([("tea",)]).rows()] == ["is of type tuple, not a mapping"]


# Rows of Python


TEA = "SELECT 'tea' AS topic, 1 AS count UNION ALL SELECT NULL, NULL"
TEA_ROWS = [{"topic": "tea", "count": 1}, {"topic": None, "count": None}]
COLUMNS = {"topic": ["tea", None], "count": [1, None]}


def sqlite_cursor(query: str = TEA) -> Any:
    database = sqlite3.connect("")
    database.row_factory = sqlite3.Row
    return database.execute(query)


def sqlalchemy_result(query: str = TEA) -> Any:
    return create_engine("sqlite://").connect().execute(text_of(query))


SOURCES: dict[str, Callable[[], Any]] = {
    "iterator": lambda: iter(TEA_ROWS),
    "polars": lambda: library("polars").DataFrame(COLUMNS),
    "polars, lazy": lambda: library("polars").DataFrame(COLUMNS).lazy(),
    "pandas": lambda: library("pandas").DataFrame({**COLUMNS, "count": [1, float("nan")]}),
    "pyarrow": lambda: library("pyarrow").table(COLUMNS),
    "rows of sqlite3": sqlite_cursor,
    "rows of SQLAlchemy": sqlalchemy_result,
    "mappings of SQLAlchemy": lambda: sqlalchemy_result().mappings(),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_source_gives_its_rows_again(kind: str):
    rows, dataset = [Row(1, TEA_ROWS[0]), Row(2, TEA_ROWS[1])], open_dataset(SOURCES[kind]())
    for _ in range(2):
        two_readers_at_once = zip(dataset.rows(), dataset.rows(), strict=True)
        assert list(two_readers_at_once) == [(row, row) for row in rows]


def test_cells_of_pandas_can_be_sent():
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
    frame = pandas.DataFrame({name: cells for name, (cells, *_) in columns.items()})
    rows = values(open_dataset(frame))
    for at, row in enumerate(rows, 1):
        assert encode_inputs(row) == {str(name): sent[at] for name, sent in columns.items() if sent[at] is not None}
    assert len(rows) == 2
    assert values(open_dataset(frame.iloc[:0])) == []
    with pytest.raises(ConfigurationError, match=r"'days' holds a value of type DatetimeIndex, which cannot be sent"):
        encode_inputs({"days": days})


def doubled_frame() -> Any:
    frame = library("pandas").DataFrame(COLUMNS)
    return library("pandas").concat([frame, frame], axis="columns")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (lambda: "rows.xlsx", "the format is not known from the file ending '.xlsx'"),
        (lambda: "rows", "the format is not known from the file ending ''"),
        (lambda: 7, "is of type int, which is not a data set"),
        (doubled_frame, "the columns 'count', 'topic' appear twice"),
        (lambda: library("pyarrow").Table.from_arrays([[1], [2]], names=["a", "a"]), "the columns 'a' appear twice"),
    ],
)
def test_source_without_rows_is_refused(source: Callable[[], Any], problem: str):
    with pytest.raises(DatasetError, match=problem):
        values(open_dataset(source()))
