"""Labelled tables: .tsv, .csv, .json and .jsonl files, also .gz -> records. Every complaint names the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

DELIMITERS = {".tsv": "\t", ".txt": "\t", ".csv": ","}
"""Extension -> what separates the columns; GLUE's MRPC calls its tab-separated table .txt."""


@dataclass(frozen=True)
class Columns:
    """Where a table has its texts and labels, and how it is written; the fields are those of a recipe's task.

    remedy: what to do where a column is missing.
    """

    text: str | int
    text_pair: str | int | None
    label: str | int
    quoting: bool = True
    remedy: str = "correct the task's text, text_pair or label"

    @property
    def all(self) -> list[str | int]:
        return [self.text, *([] if self.text_pair is None else [self.text_pair]), self.label]


@dataclass(frozen=True)
class Record:
    """One labelled row; `where` is its file and line."""

    text: str
    text_pair: str | None
    label: str
    where: str


def read(path: str | Path, columns: Columns, broken: list[str] | None = None) -> list[Record]:
    """All records of a file, in order.

    Columns are found by name in the header line (or among a JSON object's keys), or by number where no column is named: there is then
    no header. A byte-order mark is skipped. A .json file is one array of objects, or an object a line as in .jsonl.
    broken: where given, lines of another number of columns than the first are passed over, and noted in it by file and line.
    Raises UserError for what is not such a table.
    """
    path = Path(path)
    name = path.with_suffix("") if path.suffix == ".gz" else path
    if name.suffix in DELIMITERS:
        rows = _delimited(path, text_of(path), DELIMITERS[name.suffix], columns, broken)
    elif name.suffix in (".json", ".jsonl"):
        rows = _objects(path, text_of(path), columns)
    else:
        raise UserError(f"{path}: a task's table is a .tsv, .csv, .json or .jsonl file, also .gz; convert it, or name it for what it is")
    records = [Record(values[0], values[1] if len(values) == 3 else None, values[-1], where) for where, values in rows]
    if not records:
        raise UserError(f"{path}: no examples in it; give a table with a labelled text a line")
    return records


def text_of(path: Path) -> str:
    """The text of a UTF-8 file, unpacked where it is .gz, without a byte-order mark. Raises UserError where it cannot be read."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the task's files") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {content[error.start]:#04x}); save the file as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); compress the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _delimited(path: Path, text: str, delimiter: str, columns: Columns, broken: list[str] | None) -> Iterator[tuple[str, list[str]]]:
    literal = "if double quotes are literal in this file, set task.quoting: false"
    remedy = literal if columns.quoting else f"columns are separated by {delimiter!r}"
    rows = _numbered(path, text, delimiter, columns.quoting, remedy)
    first = next(rows, None)
    if first is None:
        return
    named = any(isinstance(column, str) for column in columns.all)
    found = first[1] if named else [str(number) for number in range(len(first[1]))]
    places = []
    for column in columns.all:
        place = column if isinstance(column, int) else found.index(column) if column in found else -1
        if not 0 <= place < len(found):
            header = "" if named else " (all columns are numbers, so the file has no header)"
            raise UserError(f"{first[0]}: no column {column!r}; found {', '.join(found)}{header}: {columns.remedy}")
        places.append(place)
    if not named:
        yield first[0], [first[1][place] for place in places]
    for where, row in rows:
        if len(row) != len(found) and broken is not None:
            broken.append(where)
            continue
        if len(row) != len(found):
            raise UserError(f"{where}: {len(row)} columns, the first line has {len(found)}; {remedy}")
        yield where, [row[place] for place in places]


def _numbered(path: Path, text: str, delimiter: str, quoting: bool, remedy: str) -> Iterator[tuple[str, list[str]]]:
    """Rows that are not blank, each with the line it begins on (a quoted field may hold line ends)."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE, strict=True)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where}: {error}; {remedy}") from None
        if row:
            yield where, row


def _objects(path: Path, text: str, columns: Columns) -> Iterator[tuple[str, list[str]]]:
    numbers = [column for column in columns.all if isinstance(column, int)]
    if numbers:
        raise UserError(f"{path}: column {numbers[0]} is a number, but JSON objects have names; set the task's text, text_pair and label to keys")
    for where, row in _parsed(path, text):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with {', '.join(map(str, columns.all))}, found {type(row).__name__}")
        missing = [str(column) for column in columns.all if column not in row]
        if missing:
            raise UserError(f"{where}: no key {missing[0]!r}; found {', '.join(row)}: {columns.remedy}")
        *texts, label = (row[str(column)] for column in columns.all)
        if not all(isinstance(value, str) for value in texts) or not isinstance(label, str | int | float):
            raise UserError(f"{where}: expected texts as strings and the label as a string or a number, found {json.dumps([*texts, label])[:120]}")
        yield where, [*texts, str(label)]


def _parsed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each value of a JSON array, or of a line, and where it stands."""
    where = str(path)
    try:
        if path.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("["):
            for number, value in enumerate(json.loads(text)):
                yield f"{path}: item {number}", value
            return
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}:{number}"
            if line.strip():
                yield where, json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
