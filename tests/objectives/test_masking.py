"""Whole words are hidden, from the loader's marks to the targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.settings import Specification
from pipeline.corpus.store import Store, Writer
from pipeline.objectives.masking import Masking
from pipeline.objectives.settings import MlmSettings
from pipeline.packing import plan as plans
from pipeline.packing.loader import Loader
from pipeline.packing.settings import PackSettings

LENGTH = 64


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Rows of words of one to many tokens, with punctuation between them."""
    where, draws = tmp_path_factory.mktemp("masking"), np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in draws.integers(0, 26, size)) for size in (1, 2, 3, 4, 5, 7, 9, 12) for _ in range(12)]
    texts = [" ".join(f"{word}{draws.choice(['', '', ',', '.'])}" for word in draws.choice(words, 60)) for _ in range(150)]
    tokenizers.train(Specification(kind="unigram", vocab_size=340), texts, where / "tokenizer")
    tokenizer = tokenizers.load(where / "tokenizer")
    with Writer(where / "00000", np.uint16) as writer:
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            writer.add([*ids, tokenizer.eos_token_id])
    store = Store.open(where)
    plan = plans.make(where / "plan", PackSettings(length=LENGTH), "encoder", store, tokenizer)
    return tokenizer, Loader(plan, store, tokenizer, len(plan.segments) - 1, 1, words=True)


def masked(loader, step=0, rows=slice(None), **settings):
    tokenizer, batches = loader
    batch = {name: torch.from_numpy(array)[rows] for name, array in batches.batch(0).items()}
    return Masking(MlmSettings(whole_word=True, **settings), tokenizer, seed=1)(batch, step)


def units(batch):
    """int64 [2, words]: of each word of each row in order, its tokens, and those that are hidden."""
    word, hidden = batch["word"], batch["labels"] != -100
    key = (torch.arange(len(word))[:, None] * LENGTH + word)[word >= 0]
    sizes = torch.bincount(key)
    return torch.stack([sizes, torch.bincount(key, weights=hidden[word >= 0].double()).long()])[:, sizes > 0]


def test_all_tokens_of_a_word_are_hidden_or_none(loader):
    batch = masked(loader)
    sizes, hidden = units(batch)
    assert (sizes > 2).sum() > 1000
    assert ((hidden == 0) | (hidden == sizes)).all()
    assert (batch["labels"][batch["word"] < 0] == -100).all()


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_words_and_tokens_are_hidden_at_the_rate_that_is_asked_for(loader, rate):
    sizes, hidden = torch.cat([units(masked(loader, step, mask_rate=rate)) for step in range(20)], 1).double()
    assert float((hidden > 0).double().mean()) == pytest.approx(rate, abs=0.01)
    assert float(hidden.sum() / sizes.sum()) == pytest.approx(rate, abs=0.01)


def test_what_stands_beside_a_word_has_a_draw_of_its_own(loader):
    """The comma after a word, and the word after that, are hidden no more often where the word is."""
    hidden = [units(masked(loader, step, mask_rate=0.3))[1] > 0 for step in range(10)]
    one, next_one = torch.cat([torch.stack([each[:-1], each[1:]]) for each in hidden], 1).double()
    assert float(next_one[one == 1].mean()) == pytest.approx(0.3, abs=0.02)
    comma = loader[0].get_vocab()[","]
    batch = masked(loader, mask_rate=0.3)
    original = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    at = (original == comma).nonzero()
    assert len(at) > 500
    assert all((batch["word"][row] == batch["word"][row, place]).sum() == 1 for row, place in at.tolist())


def test_a_rows_words_do_not_depend_on_the_rows_beside_it(loader):
    whole, part = masked(loader, 3), masked(loader, 3, slice(4, 7))
    for name in ("input_ids", "labels"):
        assert torch.equal(whole[name][4:7], part[name])


def test_a_row_of_low_rate_hides_one_whole_word(loader):
    batch = masked(loader, mask_rate=1e-6)
    rows, word = (batch["labels"] != -100), batch["word"]
    assert rows.any(1).all()
    for row in range(len(word)):
        hidden = word[row][rows[row]]
        assert len(hidden.unique()) == 1
        assert (word[row] == hidden[0]).sum() == len(hidden)
