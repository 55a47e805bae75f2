"""A model tested with each memory: the same documents, values from others, figures that are the losses'."""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.corpus.store import Store, Writer
from pipeline.errors import UserError
from pipeline.evaluation import memories
from pipeline.evaluation.settings import EvaluateSettings
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM

ALL = ["none", "local", "local+long", "local+long+external", "cache+long", "knn", "knn+cache+long"]


def word_tokenizer(count=30):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    words = special + [f"é{n}" for n in range(count - len(special))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    shape = {"vocab_size": 30, "hidden_size": 16, "head_dim": 8, "heads_per_layer": [2], "ffn_per_layer": [24]}
    config = TrimlineConfig(**shape, kind="decoder", norm="pre", dropout=0.0, max_position_embeddings=16, initializer_range=0.3)
    return CausalReader(TrimlineForCausalLM(config).eval())


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Thirty documents that repeat a few words each, ended by `</s>`; the first is long, one has a single token."""
    directory, draws = tmp_path_factory.mktemp("valid"), np.random.default_rng(0)
    with Writer(directory / "00000", np.uint16) as writer:
        for number in range(30):
            words = draws.integers(5, 30, size=4)
            length = 0 if number == 7 else 300 if number == 0 else int(draws.integers(12, 40))
            writer.add([*draws.choice(words, size=length), 3])
    return Store.open(directory)


class Entries:
    """A store of one key, met by nobody in particular."""

    def search(self, queries, k):
        scores = torch.full((len(queries), k), -torch.inf)
        scores[:, 0] = queries[:, 0]
        return scores, torch.where(scores.isneginf(), -1, 3)


def evaluate(reader, held_out, scratch=None, **settings):
    chosen = EvaluateSettings.model_validate({"memory": ALL, "external": {"k": [1, 4]}, "batch_size": 8, "long": {"size": 64}} | settings)
    return memories.evaluate(reader, held_out, word_tokenizer(), chosen, row_length=16, within_documents=True, store=Entries(), scratch=scratch)


@pytest.fixture(scope="module")
def tested(reader, held_out):
    return evaluate(reader, held_out)


def test_there_is_a_row_for_each_memory_and_for_the_interpolated_form(tested):
    assert [result.memory for result in tested.results] == [*ALL[:4], "local+long+external, interpolated", *ALL[4:]]
    assert {len(result.losses) for result in tested.results} == {len(tested.places)}
    assert tested.results[0].values == {}
    assert tested.results[0].share == 0
    assert set(tested.results[3].values) == {"temperature", "bias", "store_temperature", "store_bias", "neighbours"}
    assert set(tested.results[4].values) == {*tested.results[3].values, "knn_temperature", "knn_weight"}
    assert tested.results[1].seconds > tested.results[0].seconds > 0


def test_without_memory_it_is_the_plain_loss_of_the_same_windows(tested, reader):
    losses = []
    bounds = tested.text.beginnings()
    for start, end in itertools.pairwise(bounds):
        for first in range(start + 1, end, 8):
            begin, stop = max(first - 8, start), min(first + 8, end)
            with torch.no_grad():
                logits = reader.model(input_ids=torch.from_numpy(tested.text.tokens[None, begin : stop - 1])).logits[0]
            targets = torch.from_numpy(tested.text.tokens[begin + 1 : stop])
            losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none")[first - begin - 1 :].tolist()
    assert tested.results[0].losses.tolist() == pytest.approx(losses, abs=1e-5)


def test_memories_of_words_that_repeat_lower_the_loss_of_an_untrained_model(tested):
    loss = {result.memory: result.loss for result in tested.results}
    assert loss["local"] < loss["none"] - 0.2
    assert loss["cache+long"] < loss["none"] - 0.2
    assert 0 < tested.results[1].share < 1


def test_the_figures_are_the_losses_by_the_text_that_was_scored(tested):
    row = tested.report()["rows"][1]
    nats = tested.results[1].losses.sum()
    scored = tested.text.tokens[tested.places]
    words = int((scored > 4).sum())  # the end tokens are no words
    characters = sum(len(f"é{token - 5}") for token in scored if token > 4)
    gaps = words - len(np.unique(tested.text.document[tested.places]))  # a space between two words
    assert (tested.words, tested.characters, tested.bytes) == (words, characters + gaps, characters + gaps + words)
    assert row["perplexity"] == pytest.approx(math.exp(nats / len(scored)))
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / words))
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / tested.bytes)
    assert row["bits_per_character"] == pytest.approx(nats / math.log(2) / tested.characters)
    assert row["tokens_per_second"] == pytest.approx(len(scored) / tested.results[1].seconds)


def test_the_splits_are_whole_documents_spread_and_the_same_each_time(held_out):
    lengths = np.full(300, 10)
    development, test = memories.documents(lengths, EvaluateSettings())
    assert len(development) == 99
    assert np.diff(development).max() <= 4
    assert sorted([*development, *test]) == list(range(300))
    assert 7 not in np.concatenate(memories.documents(held_out.lengths, EvaluateSettings()))  # one token: nothing predicts it
    capped = EvaluateSettings(max_document_tokens=10, max_tokens=500)
    some = np.concatenate(memories.documents(np.full(300, 40), capped))
    assert len(some) == 50
    assert np.diff(np.sort(some)).max() < 15


def test_a_document_counts_to_its_cap_and_the_text_has_no_more(reader, held_out):
    found = evaluate(reader, held_out, memory="none", max_document_tokens=20, development=0)
    assert found.text.document.tolist().count(0) == 20
    assert np.bincount(found.text.document).max() == 20


def test_values_that_are_given_are_not_tuned(reader, held_out):
    found = evaluate(reader, held_out, memory=["local+long"], fixed={"temperature": 1.17, "bias": 0.25}, development=0)
    (result,) = found.results
    assert result.values == {"temperature": 1.17, "bias": 0.25}
    assert (result.development_loss, result.warnings, found.development) == (None, [], 0)
    (half,) = evaluate(reader, held_out, memory=["local+long"], fixed={"temperature": 1.17}).results
    assert half.values["temperature"] == 1.17
    assert half.development_loss is not None


def test_without_development_documents_what_was_not_given_is_said_to_be_untuned(reader, held_out):
    (result,) = evaluate(reader, held_out, memory="cache", development=0).results
    assert "cache_temperature, cache_weight: not tuned" in result.warnings[0]


def test_tuning_does_not_look_at_the_test_documents(reader, held_out, tmp_path):
    """Other test documents, the same values."""
    draws = np.random.default_rng(5)
    _, test = memories.documents(held_out.lengths, EvaluateSettings())
    with Writer(tmp_path / "00000", np.uint16) as writer:
        for number in range(len(held_out)):
            tokens = held_out.read(number)
            writer.add(draws.integers(5, 30, size=len(tokens)) if number in test else tokens)
    one, other = evaluate(reader, held_out, memory=["local", "cache"]), evaluate(reader, Store.open(tmp_path), memory=["local", "cache"])
    assert [r.values for r in one.results] == [r.values for r in other.results]
    assert [r.development_loss for r in one.results] == [r.development_loss for r in other.results]
    assert one.results[0].loss != other.results[0].loss


def test_what_was_measured_is_not_measured_again(reader, held_out, tmp_path, monkeypatch):
    whole = evaluate(reader, held_out, tmp_path)
    monkeypatch.setattr(CausalReader, "read", lambda *_, **__: pytest.fail("read again"))
    again = evaluate(reader, held_out, tmp_path)
    for one, other in zip(whole.results, again.results, strict=True):
        np.testing.assert_array_equal(one.losses, other.losses)
        assert one.seconds == other.seconds


def test_too_few_documents_and_settings_that_make_no_sense_are_told(reader, held_out, tmp_path):
    with Writer(tmp_path / "00000", np.uint16) as writer:
        writer.add([5, 6, 7, 3])
    with pytest.raises(UserError, match=r"1 held-out documents.*evaluate\.development: 0"):
        evaluate(reader, Store.open(tmp_path))
    assert len(evaluate(reader, Store.open(tmp_path), development=0).places) == 3
    for wrong, message in (
        ({"memory": ["local+lang"]}, "no memory is called 'local\\+lang'"),
        ({"memory": "local+long", "window": {"context": 512}, "long": {"size": 512}}, r"long\.size 512 is not above.*keep_duplicates: true"),
        ({"external": {"k": [0, 3]}}, "every k must be 1 or more"),
    ):
        with pytest.raises(ValidationError, match=message):
            EvaluateSettings.model_validate(wrong)
    assert EvaluateSettings.model_validate({"memory": "long+local"}).memory == ["local+long"]
