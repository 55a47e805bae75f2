from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest

from pipeline.corpus.store import Store, Writer, token_dtype
from pipeline.errors import UserError

DOCUMENTS = [[5, 6, 7, 3], [3], [], [65535, 0, 9]]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    with Writer(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)


def decode(prefix):
    """The format, read a second time from its description, with nothing of Trimline."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, indices = struct.unpack("<QBQQ", index[9:34])
    lengths = struct.unpack(f"<{sequences}i", index[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", index[34 + 4 * sequences : 34 + 12 * sequences])
    documents = struct.unpack(f"<{indices}q", index[34 + 12 * sequences :])
    kind = {4: "<i4", 8: "<u2"}[code]
    content = prefix.with_suffix(".bin").read_bytes()
    read = [np.frombuffer(content, kind, length, pointer).tolist() for length, pointer in zip(lengths, pointers, strict=True)]
    return version, read, documents


def encode(prefix, sequences, documents):
    """A store as Megatron writes it: several sequences a document."""
    lengths = [len(sequence) for sequence in sequences]
    pointers = [4 * sum(lengths[:number]) for number in range(len(lengths))]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(documents))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers) + struct.pack(f"<{len(documents)}q", *documents)
    prefix.with_suffix(".idx").write_bytes(header + body)
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}i", *s) for s in sequences))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_an_independent_reader_finds_the_documents_written(tmp_path, dtype):
    write(tmp_path / "00000", dtype=dtype)
    assert decode(tmp_path / "00000") == (1, DOCUMENTS, (0, 1, 2, 3, 4))


def test_documents_of_several_sequences_open_as_one_each(tmp_path):
    encode(tmp_path / "a", [[1, 2], [3], [], [70000]], [0, 2, 2, 4])
    store = Store.open(tmp_path)
    assert [store.read(number).tolist() for number in range(len(store))] == [[1, 2, 3], [], [70000]]
    assert store.lengths.tolist() == [3, 0, 1]


def test_shards_are_one_array_of_documents_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "00001", [[8, 9]])
    write(tmp_path / "00000")
    store = Store.open(tmp_path)
    assert len(store) == 5
    assert store.dtype == np.uint16
    assert store.read(4).tolist() == [8, 9]
    assert store.read(0, 1, 2).tolist() == [6, 7]


def test_gather_equals_reading_each_piece(tmp_path):
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 60000, draw.integers(0, 30)).tolist() for _ in range(60)]
    for shard in range(3):
        write(tmp_path / f"{shard:05d}", documents[shard * 20 : shard * 20 + 20])
    store = Store.open(tmp_path)
    document = draw.integers(0, 60, 200)
    start = (draw.random(200) * (store.lengths[document] + 1)).astype(int)
    length = (draw.random(200) * (store.lengths[document] - start + 1)).astype(int)
    expected = [token for d, s, n in zip(document, start, length, strict=True) for token in documents[d][s : s + n]]
    assert store.gather(document, start, length).tolist() == expected
    assert store.gather([], [], []).tolist() == []


def test_a_pickled_store_maps_its_shards_anew(tmp_path):
    write(tmp_path / "00000")
    content = pickle.dumps(Store.open(tmp_path))
    assert pickle.loads(content).gather([3, 0], [0, 1], [3, 2]).tolist() == [65535, 0, 9, 6, 7]
    (tmp_path / "00000.bin").unlink()
    with pytest.raises(UserError, match="missing"):
        pickle.loads(content)


def test_positions_beyond_two_gigabytes_are_reached(tmp_path):
    far = (1 << 31) + 10
    content = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", 3, 2 * far, 0, 1)
    (tmp_path / "a.idx").write_bytes(content)
    with open(tmp_path / "a.bin", "wb") as file:  # sparse: takes no space
        file.seek(2 * far)
        file.write(struct.pack("<3H", 7, 8, 9))
    store = Store.open(tmp_path)
    assert store.read(0).tolist() == store.gather([0], [0], [3]).tolist() == [7, 8, 9]


def test_the_token_type_follows_the_vocabulary():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "00000", np.uint16) as writer:
        writer.add([1, 2])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_tells_other_tokens_apart(tmp_path):
    for name, documents in (("a", [[1, 2], [3]]), ("b", [[1, 2], [3]]), ("c", [[1, 2], [4]]), ("d", [[1], [2, 3]])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "00000", documents)
    prints = [Store.open(tmp_path / name).fingerprint() for name in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def damage(path, at, content):
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda d: damage(d / "a.idx", 0, b"XX"), "a.idx: begins with"),
        (lambda d: damage(d / "a.idx", 9, b"\x02"), "a.idx: MMIDIDX version 2, expected 1"),
        (lambda d: damage(d / "a.idx", 17, b"\x63"), "a.idx: token type 99"),
        (lambda d: damage(d / "a.idx", 18, b"\x63"), "a.idx: .* expected .* 99 sequences"),
        (lambda d: damage(d / "a.idx", 34, b"\xff\xff\xff\xff"), "a.idx: sequence 0 has a negative length"),
        (lambda d: damage(d / "a.idx", 34 + 16 + 8, struct.pack("<q", 1 << 40)), "a.bin: 16 bytes, but a.idx puts sequence 1"),
        (lambda d: damage(d / "a.idx", 34 + 48, struct.pack("<q", 1)), "a.idx: document indices"),
        (lambda d: (d / "a.idx").write_bytes(b"MM"), "a.idx: 2 bytes, shorter than"),
        (lambda d: (d / "a.bin").write_bytes(b"1234"), "a.bin: 4 bytes, but a.idx puts sequence 0 .* truncated"),
        (lambda d: (d / "a.bin").unlink(), "a.bin: missing beside a.idx"),
        (lambda d: (d / "a.idx").unlink(), "no token store here"),
        (lambda d: write(d / "b", dtype=np.int32), "b.idx: tokens are int32, those of .*a.idx are uint16"),
    ],
)
def test_a_corrupt_store_is_refused_naming_the_file(tmp_path, harm, said):
    write(tmp_path / "a")
    harm(tmp_path)
    with pytest.raises(UserError, match=said):
        Store.open(tmp_path)
