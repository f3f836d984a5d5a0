"""CSV, TSV, JSON Lines and JSON, a row at a time, in bounded memory, and with the line of whatever is wrong."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from prefect_crew.api.errors import DatasetError

__all__ = ["TEXT_FORMATS", "DatasetError", "Row", "faulty", "mapping_row", "read_text"]

CHUNK = 1 << 20
ROW_LIMIT = 1 << 28
"""Characters of one row. A quote that is never closed would else make one row of a whole file."""
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16
"""Characters before the end of what was read within which an error may be the end's own."""


@dataclass(frozen=True)
class Row:
    """One row. `line` is that of the file, 1-based, or the row's number where there is no file.

    `fault` is why it is no row of this data set, None where it is one; `raw` is then what stands there.
    """

    line: int
    values: Mapping[str, Any]
    fault: str | None = None
    raw: Any = None


def faulty(line: int, fault: str, raw: Any = None) -> Row:
    """Return what stands in the place of a row and is none."""
    return Row(line, {}, fault, raw)


def read_text(file: IO[bytes], kind: str, name: str, encoding: str) -> Iterator[Row]:
    """Yield the rows of a text file.

    Args:
        file: The file, decompressed, from its beginning.
        kind: One of TEXT_FORMATS.
        name: What errors call it.
        encoding: Any that Python knows.

    Raises:
        DatasetError: It cannot be read to its end. Rows before that may have been yielded.
    """
    return TEXT_FORMATS[kind](_lines(file, name, encoding), name)


def mapping_row(value: Any, line: int) -> Row:
    """Return a mapping as a row."""
    if not isinstance(value, Mapping):
        return faulty(line, f"holds a {type(value).__name__}, not an object with inputs", value)
    return Row(line, {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()})


def _lines(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Yield the lines with their ends. Only a line feed ends one."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise DatasetError(f"there is no encoding {encoding!r}.", source=name) from None
    number = 1
    pieces: list[str] = []
    size = 0
    while True:
        chunk = file.read(CHUNK)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            shown = error.object[error.start : error.end][:8].hex(" ")
            line = number + error.object[: error.start].decode(error.encoding, "ignore").count("\n")
            raise DatasetError(
                f"the bytes {shown} are not {encoding}. Give the file's encoding=….", source=name, line=line
            ) from None
        first, *more = text.split("\n")
        pieces.append(first)
        size += len(first)
        if size > ROW_LIMIT:
            raise _too_long(name, number)
        for start in more:
            yield "".join((*pieces, "\n"))
            number += 1
            pieces, size = [start], len(start)
        if not chunk:
            break
    if size:
        yield "".join(pieces)


def _too_long(name: str, line: int) -> DatasetError:
    reason = f"has a row of more than {ROW_LIMIT >> 20:,} million characters. Is there a quote that is never closed?"
    return DatasetError(reason, source=name, line=line)


def _csv(lines: Iterable[str], name: str, delimiter: str) -> Iterator[Row]:
    # The limit of 131,072 characters a field is a process-wide default from 1999; documents are longer.
    csv.field_size_limit(2**31 - 1)
    size, start = 0, 1

    def counted() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            if size > ROW_LIMIT:
                raise _too_long(name, start)
            yield line

    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DatasetError("is empty: it has no header line.", source=name)
        _check_header(header, name)
        start = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"is no CSV: {_csv_reason(error)}.", source=name, line=start) from None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if _OPEN_QUOTE in str(error):  # it has taken all lines to the end of the file with it
                raise DatasetError(f"is no CSV: {_csv_reason(error)}.", source=name, line=start) from None
            line, start, size = start, reader.line_num + 1, 0
            yield faulty(line, f"is no CSV: {_csv_reason(error)}")
            continue
        line, start, size = start, reader.line_num + 1, 0
        if not fields:
            continue
        if len(fields) != len(header):
            yield faulty(line, f"has {len(fields)} fields, the header has {len(header)}", fields)
        else:
            yield Row(line, dict(zip(header, fields, strict=True)))


_OPEN_QUOTE = "unexpected end of data"


def _csv_reason(error: csv.Error) -> str:
    return "a quote that opens in this row is never closed" if _OPEN_QUOTE in str(error) else str(error)


def _check_header(header: list[str], name: str) -> None:
    doubled = sorted({column for column in header if header.count(column) > 1})
    if doubled:
        listed = ", ".join(repr(column) for column in doubled)
        raise DatasetError(f"the columns {listed} are there twice.", source=name, line=1)


class _TwiceError(ValueError):
    """A name is twice in one object: which value is meant?"""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        doubled = next(key for key in names if names.count(key) > 1)
        raise _TwiceError(f"the name {doubled!r} is twice in one object")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    del name
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = _decoder.decode(text)
        except (ValueError, RecursionError) as error:
            yield faulty(number, f"is no JSON: {error}", text)
        else:
            yield mapping_row(value, number)


def _json(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the objects of a JSON array one by one; a file of one object is one row."""
    text = _Text(lines, name)
    first = text.peek()
    if first == "{":
        yield text.row()
        if text.peek():
            raise text.error("has something after its object. Is it JSON Lines? Then give format='jsonl'.")
        return
    if first != "[":
        raise text.error("is empty." if first == "" else "is no JSON array of objects.")
    text.skip()
    while text.peek() != "]":
        yield text.row()
        if text.peek() == ",":
            text.skip()
            if text.peek() == "]":
                raise text.error("is no JSON: a comma before the end of the array.")
        elif text.peek() != "]":
            what = "ends in the middle of its array." if text.peek() == "" else "is no JSON: expected ',' or ']'."
            raise text.error(what)
    text.skip()
    if text.peek():
        raise text.error("has something after its end.")


class _Text:
    """A text read in pieces, from which whole JSON values are taken. `line` is where the next one stands."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self._lines = iter(lines)
        self._name = name
        self._buffer = ""
        self._at = 0
        self.line = 1

    def error(self, reason: str) -> DatasetError:
        return DatasetError(reason, source=self._name, line=self.line)

    def _more(self) -> bool:
        """Read on; at least as much again as is held, so that one long value is not parsed over and over."""
        held = self._buffer[self._at :]
        pieces, size = [held], 0
        for line in self._lines:
            pieces.append(line)
            size += len(line)
            if size >= max(CHUNK, len(held)):
                break
        self._buffer, self._at = "".join(pieces), 0
        return size > 0

    def _move(self, end: int) -> None:
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._move(space.end() if space else self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._move(self._at + 1)

    def row(self) -> Row:
        line = self.line
        return mapping_row(self._value(), line)

    def _value(self) -> Any:
        while True:
            try:
                value, end = _decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if len(self._buffer) - self._at > ROW_LIMIT:
                    raise _too_long(self._name, self.line) from None
                # Wrong, or only cut off where the reading stopped so far? Then the rest of the file decides.
                cut = error.pos >= len(self._buffer) - _CUT or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    self._move(min(error.pos, len(self._buffer)))
                    raise self.error(f"is no JSON: {error.msg}.") from None
            except (ValueError, RecursionError) as error:
                raise self.error(f"is no JSON: {error}.") from None
            else:
                self._move(end)
                return value


TEXT_FORMATS: dict[str, Callable[[Iterable[str], str], Iterator[Row]]] = {
    "csv": lambda lines, name: _csv(lines, name, ","),
    "tsv": lambda lines, name: _csv(lines, name, "\t"),
    "jsonl": _jsonl,
    "json": _json,
}
"""The formats that need nothing further, each with what yields its rows."""
