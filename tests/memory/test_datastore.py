"""Search finds what numpy finds; what is damaged, or another model's, is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.memory import description, quantiser
from pipeline.memory.datastore import Datastore
from pipeline.memory.settings import IndexSettings
from pipeline.models import identity
from pipeline.packing.plan import tokenizer_identity
from tests.memory.stores import Made, decoder, nearest

IVF = {"kind": "ivfpq", "lists": 8}
KINDS = [{}, IVF, {**IVF, "bits": 8}, {**IVF, "reduce": 8, "subquantizers": 4}]


@pytest.fixture(scope="module")
def queries():
    return torch.from_numpy(np.random.default_rng(7).standard_normal((9, 16)).astype(np.float32))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_search_with_kept_keys_is_the_formula(tmp_path, queries, metric, kind):
    """Candidates are all entries here, so that what codes and components lose does not show."""
    made = Made(tmp_path, metric=metric, shard_keys=150, documents=20, **kind)
    opened = Datastore.open(made.directory)
    keys, values = made.entries()
    assert 256 < len(opened) == len(keys) < 400
    assert len(opened.description["shards"]) > 1
    scores, found = opened.search(queries, 200)
    expected, tokens = nearest(queries.numpy(), keys, values, 200, metric)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-3, atol=2e-3)
    assert (found.numpy() == tokens).mean() > 0.95  # but for ties and nearly so
    assert scores.dtype == torch.float32
    assert found.dtype == torch.int64
    again = opened.search(queries, 200, exact=True)
    np.testing.assert_allclose(again[0].numpy(), scores.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", [IVF, {**IVF, "subquantizers": 16}, {**IVF, "reduce": 12, "subquantizers": 12}])
def test_search_without_keys_is_close_to_the_formula(tmp_path, queries, metric, kind):
    made = Made(tmp_path, metric=metric, documents=120, keep_keys=False, shard_keys=500, **kind)
    assert not list(made.directory.glob("shards/*/keys.npy"))
    opened = Datastore.open(made.directory)
    scores, found = opened.search(queries, 5)
    keys, values = made.entries()
    expected, _ = nearest(queries.numpy(), keys, values, 5, metric)
    spread = nearest(queries.numpy(), keys, values, len(keys), metric)[0].std()
    assert np.abs(scores.numpy() - expected).mean() < 0.1 * spread
    assert (scores.diff(dim=1) <= 0).all()
    assert set(found.unique().tolist()) <= set(values.tolist())
    with pytest.raises(UserError, match="keep_keys=true"):
        opened.search(queries, 5, exact=True)


def test_fewer_lists_visited_miss_what_more_find(tmp_path, queries):
    opened = Datastore.open(Made(tmp_path, documents=200, **{**IVF, "lists": 32}).directory)
    exact = opened.search(queries, 8, exact=True)[0]
    overlap = {}
    for opened.probe in (1, 32):
        overlap[opened.probe] = float(torch.isclose(opened.search(queries, 8)[0], exact, atol=1e-4).float().mean())
    assert overlap[1] < 0.9
    assert overlap[32] > 0.9


@pytest.mark.parametrize("uneven", [0.0, 0.3])
def test_what_all_keys_have_in_common_does_not_hide_their_differences(tmp_path, uneven):
    """States of real models lie in a narrow cone, where codes of inner products tell hardly anything apart."""
    draws = np.random.default_rng(0)
    keys = (20 + draws.standard_normal((4000, 16)) * np.linspace(0.2, 2, 16)).astype(np.float32)
    keys *= (16 + uneven * draws.standard_normal((4000, 1)).astype(np.float32)) / np.linalg.norm(keys, axis=1, keepdims=True)
    asked = keys[:50] + draws.standard_normal((50, 16)).astype(np.float32) / 10
    settings = IndexSettings(**IVF)
    quantiser.train(tmp_path, keys[:2000], len(keys), settings, seed=1)
    quantiser.write_part(tmp_path / "part.faiss", tmp_path, [(np.arange(4000), keys)])
    projection, index = quantiser.Projection.open(tmp_path / "projection.npz"), quantiser.merge([tmp_path / "part.faiss"])
    index.nprobe = 8
    distances, entries = index.search(projection.queries(asked), 40)
    truth = np.argsort(-asked @ keys.T, axis=1)[:, :10]
    assert np.mean([np.isin(one, other).mean() for one, other in zip(truth, entries, strict=True)]) > 0.95
    np.testing.assert_allclose(projection.similarity(asked, distances), np.take_along_axis(asked @ keys.T, entries, axis=1), rtol=0.002 + uneven / 20)


@pytest.mark.parametrize("kind", [{}, IVF])
def test_more_are_asked_for_than_there_are(tmp_path, queries, kind):
    made = Made(tmp_path, documents=14, **kind)
    opened = Datastore.open(made.directory)
    scores, values = opened.search(queries, len(opened) + 5)
    assert torch.isfinite(scores[:, : len(opened)]).all()
    assert (scores[:, len(opened) :] == -torch.inf).all()
    assert (values[:, len(opened) :] == -1).all()
    assert (values[:, : len(opened)] >= 0).all()


@pytest.mark.parametrize("words", [40_000, 70_000])
def test_values_beyond_16_bits_come_back_whole(tmp_path, words):
    made = Made(tmp_path, documents=60, words=words, **IVF)
    keys, values = made.entries()
    assert values.max() > words - 2000
    _, found = Datastore.open(made.directory).search(torch.from_numpy(keys.astype(np.float32)), 1, exact=True)
    expected = nearest(keys.astype(np.float64), keys, values, 1, "ip")[1]
    assert (found.numpy() == expected).mean() > 0.99


def test_a_truncated_shard_is_named(tmp_path):
    made = Made(tmp_path, shard_keys=150)
    shard = made.directory / "shards" / "00001" / "keys.npy"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"{shard}: has .* truncated"):
        Datastore.open(made.directory)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard}: is missing"):
        Datastore.open(made.directory)


def test_a_part_that_faiss_cannot_read_is_named(tmp_path):
    made = Made(tmp_path, **IVF)
    part = made.directory / "shards" / "00000" / "part.faiss"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(UserError, match=f"{part}: not a readable part"):
        Datastore.open(made.directory)


def test_another_format_and_no_datastore_are_refused(tmp_path):
    made = Made(tmp_path)
    path = made.directory / description.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Datastore.open(made.directory)
    with pytest.raises(UserError, match="no datastore here"):
        Datastore.open(tmp_path / "model")


def test_another_model_or_tokenizer_is_refused(tmp_path):
    made = Made(tmp_path)
    opened = Datastore.open(made.directory)
    mine, words = identity.fingerprint(made.model_directory), tokenizer_identity(made.tokenizer)
    opened.check(mine, words)
    decoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made with model"):
        opened.check(identity.fingerprint(tmp_path / "other"), words)
    with pytest.raises(UserError, match="made with tokenizer"):
        opened.check(mine, "0" * 64)


def test_settings_that_contradict_one_another():
    with pytest.raises(ValueError, match="keep_keys: true"):
        IndexSettings(kind="flat", keep_keys=False)
    with pytest.raises(ValueError, match="not a divisor"):
        IndexSettings(reduce=10, subquantizers=4)
