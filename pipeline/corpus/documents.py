"""Documents of a source, one at a time: Hugging Face `datasets` in streaming mode, so that memory does not grow with the corpus."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.corpus import embedded, sources
from pipeline.corpus.settings import Source
from pipeline.errors import UserError

_ROWS = 256
"""Rows taken from `datasets` at a time."""
_TITLE = re.compile("= [^=].*[^=] =|= [^=] =")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """text: as it was read. key: where it came from, for messages. held_out: whether its source says it must not be trained on."""

    text: str
    key: str
    held_out: bool | None = None


def read(source: Source) -> Iterator[Document]:
    """Every document of a source, in the order of its files and rows. Rows whose text is null are passed over.

    Raises UserError, naming file and place, for what cannot be read: a missing column, text that is not UTF-8, broken JSON.
    """
    if source.embedded:
        for entry in embedded.entries():
            yield Document(entry.document, entry.qualified_name, embedded.split_of(entry.module) != "train")
    elif source.hub is not None:
        yield from _read_hub(source.hub, source)
    else:
        assert source.path is not None
        for path in sources.files(source.path):
            yield from _read_file(path, source.text)


def clean(text: str) -> str:
    """Newlines as `\\n`; control characters other than tab and newline, and surrogates, removed; no space around the whole."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text).strip()


def _read_file(path: Path, column: str) -> Iterator[Document]:
    import datasets

    builder = sources.builder(path)
    options: dict[str, Any] = {}
    if builder == sources.WIKITEXT:
        yield from _read_wikitext(path)
        return
    if builder == "text":
        column, options = "text", {"sample_by": "paragraph"}
    elif builder == "csv":  # other columns are not parsed: theirs may be of any type
        options = {"usecols": [column], "features": datasets.Features({column: datasets.Value("string")}), "keep_default_na": False}
    try:
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # our message says it, with the line
        stream = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        for row, text in enumerate(_texts(stream, column, str(path))):
            yield Document(text, f"{path}, document {row + 1}")
    except UserError:
        raise
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from None
        raise
    except Exception as error:  # datasets, pyarrow and pandas each raise their own kinds
        raise _explained(path, builder, column, error) from error


def _read_wikitext(path: Path) -> Iterator[Document]:
    """A document an article: each begins with a line `= Title =` between empty lines."""
    article: list[str] = []
    number, before = 1, ""
    try:
        with io.TextIOWrapper(_opened(path), encoding="utf-8", newline="\n") as file:
            for line, after in itertools.pairwise(itertools.chain(file, [""])):
                if _TITLE.fullmatch(line.strip()) and not before.strip() and not after.strip() and any(map(str.strip, article)):
                    yield Document("".join(article), f"{path}, document {number}")
                    article, number = [], number + 1
                article.append(line)
                before = line
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _explained(path, sources.WIKITEXT, "", error) from error
    yield Document("".join(article), f"{path}, document {number}")


def _read_hub(name: str, source: Source) -> Iterator[Document]:
    import datasets

    try:
        stream = datasets.load_dataset(name, source.subset, split=source.split, streaming=True)
        for row, text in enumerate(_texts(stream, source.text, name)):
            yield Document(text, f"{name}, row {row + 1}")
    except UserError:
        raise
    except Exception as error:  # anything from a name that does not exist to a lost connection
        subset = f", subset {source.subset}" if source.subset else ""
        raise UserError(
            f"hub dataset {name}{subset}, split {source.split}: cannot be read: {_first_line(error)}; check name, subset, split and connection,"
            " or download it and give its path"
        ) from error


def _texts(stream: Any, column: str, place: str) -> Iterator[str]:
    import pyarrow

    for table in stream.with_format("arrow").iter(_ROWS):
        if column not in table.column_names:
            raise _no_column(place, column, table.column_names)
        kind = table.schema.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
            raise UserError(f"{place}: column {column!r} holds {kind}, expected text; name the text column in the source's `text`")
        yield from (text for text in table.column(column).to_pylist() if text is not None)


def _no_column(place: str, column: str, found: list[str]) -> UserError:
    return UserError(f"{place}: no column {column!r}; it has {', '.join(map(repr, found))}: name the text column in the source's `text`")


# -- what went wrong in a file: read it once more, looking for the place ----------------------------------------------


def _explained(path: Path, builder: str, column: str, error: Exception) -> UserError:
    if builder == "parquet":
        return UserError(f"{path}: not a readable Parquet file: {_first_line(error)}; write it again, or take it out of the recipe")
    try:
        with _opened(path) as file:
            found = _not_utf8(file)
        if found is None and builder == "json":
            with _opened(path) as file:
                found = _broken_line(file)
        if found is None and builder == "csv":
            import pandas

            columns = list(pandas.read_csv(path, nrows=0).columns)
            if column not in columns:
                return _no_column(str(path), column, columns)
    except (EOFError, gzip.BadGzipFile) as broken:
        found = f"not a whole gzip file ({broken}); fetch or compress it again"
    except ValueError:
        found = None
    return UserError(f"{path}: {found or f'cannot be read: {_first_line(error)}; correct the file, or take it out of the recipe'}")


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _not_utf8(file: BinaryIO) -> str | None:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    while block := file.read(1 << 20):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(block)
        except UnicodeDecodeError as error:
            offset = read - pending + error.start
            return f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {offset}; convert it, for example with iconv -t UTF-8"
        read += len(block)
    if decoder.getstate()[0]:
        return f"not UTF-8 text: it ends inside a character at offset {read - len(decoder.getstate()[0])}; the file was cut off: fetch it again"
    return None


def _broken_line(file: BinaryIO) -> str | None:
    for number, line in enumerate(file, 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError as error:
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            return f"line {number}{at}: not JSON ({getattr(error, 'msg', error)}); expected one object a line"
        if not isinstance(record, dict):
            return f"line {number}: {type(record).__name__} {line.strip()[:40].decode()!r}, expected one JSON object a line"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
