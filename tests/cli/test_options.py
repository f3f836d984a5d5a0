"""Inputs given on the command line and in files."""

from __future__ import annotations

import io
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.cli._errors import UsageError
from prefect_crew.cli._options import gather_inputs
from prefect_crew.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        pytest.param("topic=Lisbon", {"topic": "Lisbon"}, id="plain"),
        pytest.param("sum=1+1=2", {"sum": "1+1=2"}, id="equals-sign-in-the-value"),
        pytest.param("topic=", {"topic": ""}, id="empty-value"),
        pytest.param("age=35", {"age": "35"}, id="number-stays-text"),
        pytest.param('rows=[{"a": 1}]', {"rows": '[{"a": 1}]'}, id="json-stays-text"),
        pytest.param("handle=@someone", {"handle": "@someone"}, id="at-sign-reads-no-file"),
        pytest.param("نص=مرحبا", {"نص": "مرحبا"}, id="other-script"),
    ],
)
def test_pair(pair: str, expected: dict[str, str]):
    assert gather_inputs([pair], None) == expected


@pytest.mark.parametrize(
    "pairs", [["topic"], ["=Lisbon"], [""], ["a=1", "a=2"]], ids=["no-sign", "no-name", "empty", "twice"]
)
def test_pairs_that_make_no_sense(pairs: list[str]):
    with pytest.raises(UsageError):
        gather_inputs(pairs, None)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        pytest.param("in.json", '{"topic": "tea", "n": 3}', {"topic": "tea", "n": 3}, id="json"),
        pytest.param("in.yaml", "topic: tea\nday: 2026-05-01\n", {"topic": "tea", "day": date(2026, 5, 1)}, id="yaml"),
        pytest.param("in.txt", "topic: tea", {"topic": "tea"}, id="any-other-name"),
        pytest.param("in.json", '\ufeff{"topic": "tea"}', {"topic": "tea"}, id="with-a-byte-order-mark"),
        pytest.param("in.yaml", '{"topic":\t"tea"}', {"topic": "tea"}, id="json-called-yaml"),
    ],
)
def test_file(tmp_path: Path, name: str, text: str, expected: dict[str, Any]):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert gather_inputs([], str(tmp_path / name)) == expected


def test_pairs_are_laid_over_the_file_and_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"topic": "tea", "size": "big"}'))
    assert gather_inputs(["size=small"], "-") == {"topic": "tea", "size": "small"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        pytest.param("in.json", b"[topic, tea]", "holds no inputs", id="no-object"),
        pytest.param("in.yaml", b"a: b: c: [", "neither JSON nor YAML", id="no-yaml"),
        pytest.param("in.json", b'["topic"]', "holds no inputs", id="a-list"),
        pytest.param("in.yaml", b"", "holds no inputs", id="empty"),
        pytest.param("in.yaml", b"\xff\xfe\x00", "'utf-8' codec can't decode", id="binary"),
        pytest.param("in.yaml", b"n: .nan", "'n'", id="not-a-number"),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        gather_inputs([], str(tmp_path / name))


def test_missing_file(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="No such file"):
        gather_inputs([], str(tmp_path / "none.json"))
