"""What memories say of a text, against a loop over places and entries in plain Python."""

import math

import numpy as np
import pytest
import torch

from pipeline.memory import pieces, statistics
from pipeline.memory.kinds import Memory
from pipeline.memory.long_term import LongTerm
from pipeline.memory.mixtures import predict
from pipeline.memory.reading import Text, windows
from pipeline.memory.statistics import Measurement, measure
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM
from pipeline.objectives.settings import TrimeSettings
from pipeline.objectives.trime import TrimeLocal

VOCABULARY = 23
TEMPERATURES = {"local": (0.5, 1.0), "long": (1.0, 1.6), "external": (0.3, 2.0)}
NEIGHBOURS = (3, 8)


def decoder(seed=0, length=16):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "head_dim": 8, "heads_per_layer": [2, 2], "ffn_per_layer": [24, 24]}
    config = TrimlineConfig(**shape, kind="decoder", norm="pre", dropout=0.0, max_position_embeddings=length, initializer_range=0.4)
    return CausalReader(TrimlineForCausalLM(config).eval())


def text(lengths=(13, 1, 7, 21), seed=0):
    draws = np.random.default_rng(seed)
    return Text(draws.integers(5, VOCABULARY, size=sum(lengths)), np.repeat(np.array([3, 4, 8, 9])[: len(lengths)], lengths))


class Exact:
    """A datastore of random keys, searched in full."""

    def __init__(self, entries=40, width=16, seed=1):
        draws = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(entries, width, generator=draws)
        self.values = torch.randint(5, VOCABULARY, (entries,), generator=draws)
        self.asked = 0

    def search(self, queries, k):
        self.asked += len(queries)
        scores, found = (queries @ self.keys.T / math.sqrt(queries.shape[1])).topk(min(k, len(self.keys)), dim=1)
        empty = max(k - len(self.keys), 0)
        return torch.nn.functional.pad(scores, (0, empty), value=-torch.inf), torch.nn.functional.pad(self.values[found], (0, empty), value=-1)


def how(**changes):
    chosen = {"block": 4, "context": 5, "within_documents": False, "temperatures": TEMPERATURES, "neighbours": NEIGHBOURS, "batch_size": 3}
    return Measurement(**(chosen | {"long": LongTerm(9, reset=False)} | changes))


def naive(reader, stream, measurement, store):
    """Of each scored place: log partition, target score, and every (log sum of all, of matches); one window, place and entry at a time."""
    tokens, document, long = stream.tokens.tolist(), stream.document.tolist(), measurement.long
    kept, rows = [], []  # entries that were scored: place, key, value
    for begin, first, end in windows(stream, measurement.block, measurement.context, within_documents=measurement.within_documents).tolist():
        with torch.no_grad():
            hidden, states = reader.read(input_ids=torch.tensor([tokens[begin : end - 1]]))
            logits = reader.logits(hidden)[0].double()
        states = states[0].double()
        for place in range(first, end):
            query, target = states[place - begin - 1], tokens[place]
            own = [(states[j - begin - 1], tokens[j]) for j in range(begin + 1, place)]
            before = [entry for entry in kept if entry[0] < first][-long.size :]
            if not long.keep_duplicates:
                before = [entry for entry in before if not begin < entry[0] < first]
            if long.reset:
                before = [entry for entry in before if document[entry[0]] == document[place]]
            scores, values = (found[0].tolist() for found in store.search(query.float()[None], NEIGHBOURS[-1]))
            row = {
                "partition": math.log(sum(math.exp(x) for x in logits[place - begin - 1].tolist())),
                "target": float(logits[place - begin - 1][target]),
                "local": [sums(own, query, target, t) for t in TEMPERATURES["local"]],
                "long": [sums([(key, value) for _, key, value in before], query, target, t) for t in TEMPERATURES["long"]],
                "external": [[log_sums(scores[:k], values[:k], target, t) for t in TEMPERATURES["external"]] for k in NEIGHBOURS],
            }
            rows.append((place, row))
        kept += [(place, states[place - begin - 1], tokens[place]) for place in range(first, end)]
    return rows


def sums(entries, query, target, temperature):
    scores = [float(query @ key) / math.sqrt(len(query)) for key, _ in entries]
    return log_sums(scores, [value for _, value in entries], target, temperature)


def log_sums(scores, values, target, temperature):
    everything = sum(math.exp(score / temperature) for score in scores)
    matched = sum(math.exp(score / temperature) for score, value in zip(scores, values, strict=True) if value == target)
    return [math.log(total) if total else -math.inf for total in (everything, matched)]


LONG = [
    LongTerm(9, reset=False),
    LongTerm(9),
    LongTerm(9, reset=False, keep_duplicates=True),
    LongTerm(9, keep_duplicates=True),
    LongTerm(1000, reset=False),
]


@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize("long", LONG, ids=str)
def test_every_memory_is_what_a_loop_over_places_and_entries_sums(long, within_documents):
    reader, stream, store = decoder(), text(), Exact()
    measurement = how(long=long, within_documents=within_documents)
    found = measure(reader, stream, measurement, store=store)
    expected = naive(reader, stream, measurement, store)
    assert found.places.tolist() == [place for place, _ in expected]
    assert found.partition == pytest.approx([row["partition"] for _, row in expected], abs=2e-5)
    assert found.target == pytest.approx([row["target"] for _, row in expected], abs=2e-5)
    for part in ("local", "long", "external"):
        wanted = np.moveaxis(np.array([row[part] for _, row in expected]), -1, 0)
        assert np.isfinite(wanted).any()
        np.testing.assert_allclose(found.pairs[part], wanted, atol=5e-5, err_msg=part)


def test_the_loss_without_memory_is_the_models_own():
    reader, stream = decoder(), text((12,))
    found = measure(reader, stream, how(block=11, context=0, temperatures={}))
    with torch.no_grad():
        loss = reader.model(input_ids=torch.from_numpy(stream.tokens[None])).logits[0, :-1].log_softmax(1)
    assert (found.partition - found.target).tolist() == pytest.approx([-float(loss[i, t]) for i, t in enumerate(stream.tokens[1:])], abs=1e-5)


def test_training_and_testing_with_local_memory_are_one_formula():
    reader, stream = decoder(), text((12,))
    found = measure(reader, stream, how(block=11, context=0, temperatures={"local": (1.0,)}))
    rows = torch.from_numpy(stream.tokens[None])
    objective = TrimeLocal(TrimeSettings(), seed=0, ce_warmup_steps=0).eval()
    batch = objective.prepare({"input_ids": rows, "attention_mask": torch.ones_like(rows), "segment": torch.zeros(1, dtype=torch.long)}, 0)
    with torch.no_grad():
        losses = objective.token_losses(reader.model, batch, 0)
    prediction = predict(Memory.of("local"), found, {"temperature": 1.0})
    np.testing.assert_allclose(-prediction.log_probability, losses["trime"], atol=1e-5)
    np.testing.assert_allclose(prediction.share, losses["memory_share"], atol=1e-5)


def test_a_long_memory_that_holds_everything_beside_windows_that_do_not_overlap_is_one_causal_memory():
    """Specification of the memory: joint sums of local and long equal those over all earlier entries, as the windows made them."""
    reader, stream = decoder(), text((30,))
    measurement = how(block=6, context=0, long=LongTerm(1000, reset=False), temperatures={"local": (1.0,), "long": (1.0,)}, neighbours=())
    found = measure(reader, stream, measurement)
    both = np.logaddexp(found.pairs["local"], found.pairs["long"])[:, :, 0]
    spans = windows(stream, 6, 0, within_documents=False)
    with torch.no_grad():
        states = torch.cat([reader.read(input_ids=torch.from_numpy(stream.tokens[None, begin : end - 1]))[1][0] for begin, _, end in spans])
    values = torch.from_numpy(stream.tokens[1:])
    scores = (states @ states.T / 4).masked_fill(torch.ones(29, 29).tril(-1) == 0, -torch.inf)
    matching = scores.masked_fill(values[:, None] != values[None], -torch.inf)
    np.testing.assert_allclose(both, torch.stack([scores.logsumexp(1), matching.logsumexp(1)]), atol=2e-5)


def test_what_comes_later_changes_nothing_of_what_came_before():
    reader, stream, store, changed = decoder(), text(), Exact(), 25
    other = Text(stream.tokens.copy(), stream.document)
    other.tokens[changed:] = (stream.tokens[changed:] - 5 + 7) % (VOCABULARY - 5) + 5
    measurement = how(long=LongTerm(1000, reset=False))
    one, two = (measure(reader, each, measurement, store=store) for each in (stream, other))
    before = one.places < changed
    assert before.sum() > 10
    np.testing.assert_allclose(one.partition[before], two.partition[before], atol=1e-5)
    for part in TEMPERATURES:
        np.testing.assert_allclose(one.pairs[part][:, before], two.pairs[part][:, before], atol=1e-5)
        assert not np.allclose(one.pairs[part][:, ~before], two.pairs[part][:, ~before], atol=1e-5)


def test_the_store_is_asked_once_for_each_scored_place_and_not_where_the_model_is_confident():
    reader, stream, store = decoder(), text(), Exact()
    always = measure(reader, stream, how(temperatures={"external": (1.0,)}), store=store)
    assert store.asked == len(always.places)
    store.asked = 0
    skipped = measure(reader, stream, how(temperatures={"external": (1.0,)}, skip_confident=0.6), store=store)
    np.testing.assert_allclose(skipped.target - skipped.partition, always.target - always.partition, atol=1e-5)
    with torch.no_grad():
        confident = []
        for begin, first, end in windows(stream, 4, 5, within_documents=False).tolist():
            hidden, _ = reader.read(input_ids=torch.from_numpy(stream.tokens[None, begin : end - 1]))
            confident += (reader.logits(hidden)[0, first - begin - 1 :].softmax(1).amax(1) >= 0.6).tolist()
    assert 0 < sum(confident) < len(confident)
    assert store.asked == len(confident) - sum(confident)
    assert np.isneginf(skipped.pairs["external"]).all(axis=(0, 2, 3)).tolist() == confident
    np.testing.assert_array_equal(skipped.pairs["external"][:, ~np.array(confident)], always.pairs["external"][:, ~np.array(confident)])


def test_a_store_with_fewer_entries_than_asked_for_gives_those_it_has():
    reader, stream = decoder(), text()
    few = measure(reader, stream, how(temperatures={"external": (1.0,)}, neighbours=(2, 50)), store=Exact(entries=5)).pairs["external"]
    all_of_them = measure(reader, stream, how(temperatures={"external": (1.0,)}, neighbours=(2, 5)), store=Exact(entries=5)).pairs["external"]
    np.testing.assert_allclose(few, all_of_them, atol=1e-5)
    nothing = measure(reader, stream, how(temperatures={"external": (1.0,)}), store=Exact(entries=0)).pairs["external"]
    assert np.isneginf(nothing).all()


def test_queries_are_the_encoders_states_where_there_is_one():
    reader, encoder, stream, store = decoder(), decoder(seed=7), text(), Exact()
    alone = how(temperatures={"external": (1.0,)})
    mixed = measure(reader, stream, alone, store=store, encoder=encoder)
    np.testing.assert_allclose(mixed.pairs["external"], measure(encoder, stream, alone, store=store).pairs["external"], atol=1e-5)
    np.testing.assert_array_equal(mixed.target, measure(reader, stream, alone, store=store).target)


class CutOff(Exception):
    pass


@pytest.mark.parametrize("long", LONG, ids=str)
def test_a_measurement_that_was_cut_off_goes_on_to_the_same_bits_and_is_not_made_again(tmp_path, monkeypatch, long):
    monkeypatch.setattr(statistics, "PIECE", 12)
    reader, stream, store = decoder(), text(), Exact()
    whole = measure(reader, stream, how(long=long), store=store)
    made = []

    def cut_off(directory, name, make, kept=pieces.kept):
        if len(made) == 2:
            raise CutOff
        made.append(name)
        return kept(directory, name, make)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(pieces, "kept", cut_off)
        measure(reader, stream, how(long=long), store=store, directory=tmp_path)
    store.asked = 0
    resumed = measure(reader, stream, how(long=long), store=store, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert 0 < store.asked < len(whole.places)
    for part in TEMPERATURES:
        np.testing.assert_array_equal(resumed.pairs[part], whole.pairs[part])
    store.asked = 0
    measure(reader, stream, how(long=long), store=store, directory=tmp_path)
    assert store.asked == 0
    measure(reader, stream, how(long=long), store=store, directory=tmp_path, identity="another model")
    assert store.asked == len(whole.places)


def test_blocks_of_rows_and_entries_change_nothing(monkeypatch):
    reader, stream, store = decoder(), text(), Exact()
    whole = measure(reader, stream, how(), store=store)
    monkeypatch.setattr(statistics.sums, "ROWS", 2)
    monkeypatch.setattr(statistics.sums, "ENTRIES", 3)
    blocks = measure(reader, stream, how(), store=store)
    for part in TEMPERATURES:
        np.testing.assert_allclose(blocks.pairs[part], whole.pairs[part], atol=1e-5)


def test_a_match_far_below_the_best_entry_is_not_lost():
    scores = torch.tensor([[0.0, -200.0]])
    found = statistics.sums.of_scores(scores, torch.tensor([[False, True]]), (1.0, 0.5))
    assert found.tolist() == [[[0.0, 0.0]], [[-200.0, -400.0]]]


def test_each_part_says_how_long_it_took():
    seconds = measure(decoder(), text(), how(), store=Exact()).seconds
    assert seconds.keys() == {"model", "local", "long", "external"}
    assert min(seconds.values()) > 0


def test_a_text_without_places_has_no_statistics():
    found = measure(decoder(), text((1,)), how(within_documents=True), store=Exact())
    assert len(found.places) == 0
    assert found.pair("external", 0.3, 8)[0].shape == (0,)
