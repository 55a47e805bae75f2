"""The token store: Megatron-LM's indexed dataset (MMIDIDX version 1), written and read without Megatron.

A shard is two files. `.bin`: the tokens of all sequences, end to end. `.idx`, little-endian:

    b"MMIDIDX\\0\\0", version u64 = 1, token type u8 (1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16),
    sequences S u64, document indices D + 1 u64, lengths int32 [S], byte offsets in .bin int64 [S],
    document indices int64 [D + 1]: document d is the sequences index[d] .. index[d + 1] - 1

Trimline writes one sequence a document; stores with several, as Megatron makes them, open too.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

from pipeline.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")

Tokens = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type the format has for a vocabulary: uint16 where it fits, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class Writer:
    """One shard, `prefix.bin` and `prefix.idx`: both complete or, until `close`, under temporary names.

    The .idx appears last, so that a shard whose .idx is there is whole. As a context manager it closes on success and
    leaves nothing on an exception.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
        self._prefix = Path(prefix)
        self._temporary = self._path(".bin.tmp")
        self._bin = open(self._temporary, "wb")  # noqa: SIM115 closed by close() or __exit__
        self._lengths: list[int] = []

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append one document: token numbers [length], length below 2**31."""
        array = np.asarray(tokens)
        info = np.iinfo(self._dtype)
        assert array.size == 0 or (array.min() >= info.min and array.max() <= info.max), f"token beyond {self._dtype}"
        self._bin.write(array.astype(self._dtype).tobytes())
        self._lengths.append(len(array))

    def close(self) -> None:
        """Sync both files to disk and give them their names, the .idx last."""
        _sync_and_close(self._bin)
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1].astype("<i8")
        index = self._path(".idx.tmp")
        with open(index, "wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(offsets.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _sync_and_close(file)
        os.replace(self._temporary, self._path(".bin"))
        os.replace(index, self._path(".idx"))

    def _path(self, suffix: str) -> Path:
        return self._prefix.with_name(self._prefix.name + suffix)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()
            self._temporary.unlink(missing_ok=True)
            self._path(".idx.tmp").unlink(missing_ok=True)


class Store:
    """All shards of a directory as one array of documents. Tokens stay on disk; 16 bytes a document are held in memory."""

    def __init__(self, shards: list[_Shard]) -> None:
        self._shards = shards
        self.dtype: np.dtype = shards[0].dtype
        self.lengths: npt.NDArray[np.int64] = np.concatenate([shard.lengths for shard in shards])
        self.addresses: npt.NDArray[np.int64] = np.concatenate([shard.tokens.ctypes.data + shard.starts * self.dtype.itemsize for shard in shards])
        """Where in this process's memory each document begins, for compiled code (`tokens_at`); valid as long as the store is."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self._shards[0].path.parent,)  # another process maps the shards elsewhere

    @classmethod
    def open(cls, directory: str | Path) -> Store:
        """Raises UserError, naming the file, when there is no shard or one is not a whole MMIDIDX store."""
        paths = sorted(Path(directory).glob("*.idx"))
        if not paths:
            raise UserError(f"{directory}: no token store here (no .idx file); run the tokenize stage, or give the directory that holds the shards")
        shards = [_Shard(path) for path in paths]
        for shard in shards:
            if shard.dtype != shards[0].dtype:
                raise UserError(f"{shard.path}: tokens are {shard.dtype}, those of {shards[0].path} are {shards[0].dtype}; keep stores apart")
        return cls(shards)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, length: int | None = None) -> Tokens:
        """Tokens [length] of a document from `start`; to its end without `length`."""
        return self.gather([document], [start], [int(self.lengths[document]) - start if length is None else length])

    def gather(self, documents: npt.ArrayLike, starts: npt.ArrayLike, lengths: npt.ArrayLike) -> Tokens:
        """The tokens of many pieces end to end: documents, starts, lengths [pieces] -> [sum of lengths]."""
        document, start, length = (np.ascontiguousarray(array, dtype=np.int64) for array in (documents, starts, lengths))
        assert np.all((start >= 0) & (length >= 0) & (start + length <= self.lengths[document]))
        out = np.empty(length.sum(), dtype=self.dtype)
        _gather(self.addresses[document] + start * self.dtype.itemsize, length, out)
        return out

    def fingerprint(self) -> str:
        """sha256 over token type, document lengths, and size and both ends of every .bin: quick, and other for other tokens."""
        digest = hashlib.sha256(f"{self.dtype}".encode())
        digest.update(self.lengths.tobytes())
        for shard in self._shards:
            digest.update(f"{len(shard.tokens)}".encode())
            digest.update(shard.tokens[:4096].tobytes() + shard.tokens[-4096:].tobytes())
        return digest.hexdigest()


class _Shard:
    """One .idx and its .bin: `lengths` int64 and `starts` int64 [documents], `tokens` the mapped .bin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        if len(content) < _HEADER.size:
            raise self._corrupt(f"{len(content)} bytes, shorter than an MMIDIDX header")
        magic, version, code, sequences, indices = _HEADER.unpack_from(content)
        if magic != MAGIC:
            raise self._corrupt(f"begins with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise self._corrupt(f"MMIDIDX version {version}, expected {VERSION}")
        if code not in DTYPES:
            raise self._corrupt(f"token type {code}, expected one of {', '.join(map(str, DTYPES))}")
        expected = _HEADER.size + 12 * sequences + 8 * indices
        if len(content) < expected or indices < 1:
            raise self._corrupt(f"{len(content)} bytes, expected {expected} for {sequences} sequences and {indices} document indices")
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        at = _HEADER.size
        lengths = np.frombuffer(content, "<i4", sequences, at).astype(np.int64)
        offsets = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
        index = np.frombuffer(content, "<i8", indices, at + 12 * sequences)
        self._check_index(lengths, index)
        self.tokens = self._map(lengths, offsets)
        self.lengths, self.starts = self._documents(lengths, offsets // self.dtype.itemsize, index)

    def _check_index(self, lengths: npt.NDArray[np.int64], index: npt.NDArray[np.int64]) -> None:
        if (lengths < 0).any():
            raise self._corrupt(f"sequence {int(np.argmax(lengths < 0))} has a negative length")
        if index[0] != 0 or index[-1] != len(lengths) or (np.diff(index) < 0).any():
            raise self._corrupt(f"document indices do not rise from 0 to the {len(lengths)} sequences")

    def _map(self, lengths: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> Tokens:
        path = self.path.with_suffix(".bin")
        if not path.is_file():
            raise UserError(f"{path}: missing beside {self.path.name}; restore it, or run the tokenize stage again")
        size = path.stat().st_size
        ends = offsets + lengths * self.dtype.itemsize
        wrong = (offsets < 0) | (offsets % self.dtype.itemsize != 0) | (ends > size)
        if wrong.any():
            sequence = int(np.argmax(wrong))
            raise UserError(
                f"{path}: {size} bytes, but {self.path.name} puts sequence {sequence} at bytes {offsets[sequence]} to {ends[sequence]};"
                " the store is truncated or corrupt: run the tokenize stage again"
            )
        if size < self.dtype.itemsize:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r", shape=(size // self.dtype.itemsize,))

    def _documents(
        self, lengths: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], index: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        first, end = index[:-1], index[1:]
        if len(index) - 1 != len(lengths):
            inside = np.ones(max(len(lengths) - 1, 0), dtype=bool)
            inside[first[(first > 0) & (first < len(lengths))] - 1] = False
            if (starts[1:] != starts[:-1] + lengths[:-1])[inside].any():
                raise self._corrupt("a document's sequences do not follow one another in the .bin")
        padded = np.append(starts, 0)
        return before[end] - before[first], padded[first]

    def _corrupt(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}; not a whole token store: run the tokenize stage again, or restore the file")


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer, which numba has no word for."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(address), generate


@numba.njit
def tokens_at(address, length, like):  # type: ignore[no-untyped-def]
    """For compiled code: the tokens [length] at that address, an array of `like`'s type. Nothing is checked or copied."""
    return numba.carray(_pointer(address), length, like.dtype)  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def _gather(addresses, lengths, out):  # type: ignore[no-untyped-def]
    at = 0
    for piece in range(len(addresses)):
        tokens = tokens_at(addresses[piece], lengths[piece], out)
        for i in range(lengths[piece]):
            out[at + i] = tokens[i]
        at += lengths[piece]
