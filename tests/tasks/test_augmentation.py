import re

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.tasks.augmentation import EXCHANGED, NEAREST, augmented
from pipeline.tasks.task import Example

WORDS = [f"w{number}" for number in range(60)]
SINGLES = [Example(" ".join(WORDS[first : first + 20]), None, first % 2) for first in range(41)]


def tokenizer(pieces=WORDS):
    """Wordpieces, some of which go on a word, lower-cased."""
    vocabulary = {token: number for number, token in enumerate(["[UNK]", *pieces, "play", "##ed", "##'", ",", "(", ")", "."])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(70, 8, generator=torch.Generator().manual_seed(0))


def test_copies_follow_the_examples_with_their_labels_and_the_same_seed_makes_the_same(embeddings):
    made = augmented(SINGLES, tokenizer(), embeddings, 3, seed=1)
    assert made[: len(SINGLES)] == SINGLES
    assert [example.label for example in made] == [example.label for example in SINGLES] * 4
    assert made == augmented(SINGLES, tokenizer(), embeddings, 3, seed=1)
    assert made != augmented(SINGLES, tokenizer(), embeddings, 3, seed=2)
    assert len({example.text for example in made}) == len(made)


def test_so_many_words_give_way_each_to_one_of_its_nearest(embeddings):
    copies = 40
    made = augmented(SINGLES, tokenizer(), embeddings, copies, seed=1)
    about_mean = embeddings[1:61] - embeddings[1:61].mean(0)
    nearest = torch.nn.functional.cosine_similarity(about_mean[:, None], about_mean[None], dim=2).fill_diagonal_(-2).topk(NEAREST).indices
    met = {word: set() for word in WORDS}
    for number, example in enumerate(made):
        for before, after in zip(SINGLES[number % len(SINGLES)].text.split(), example.text.split(), strict=True):
            met[before].add(after)
    for word, others in zip(WORDS, nearest.tolist(), strict=True):
        assert met[word] <= {word, *(WORDS[other] for other in others)}
    assert met["w30"] == {"w30", *(WORDS[other] for other in nearest[30].tolist())}
    pairs = [pair for number, example in enumerate(made[41:]) for pair in zip(SINGLES[number % 41].text.split(), example.text.split(), strict=True)]
    assert sum(before != after for before, after in pairs) / len(pairs) == pytest.approx(EXCHANGED, abs=0.01)


def test_what_is_no_word_of_one_token_stays_and_pairs_are_both_copied(embeddings):
    text, pair = "W1,  (w2) played unheard w3.w4 ", "w5 played w6"
    made = augmented([*SINGLES, Example(text, pair, 1)], tokenizer(), embeddings, 50, seed=1)
    ours = [example for example in made if example.text_pair is not None]
    assert len({example.text for example in ours}) > 40
    assert len({example.text_pair for example in ours}) > 10
    for example in ours:
        assert re.fullmatch(r"W?w?\d+,  \(w\d+\) played unheard w\d+\.w\d+ ", example.text)
        assert re.fullmatch(r"w\d+ played w\d+", example.text_pair)
    assert all(example.text_pair is None for example in made if example not in ours)


def test_a_word_of_both_texts_gives_way_in_both_alike(embeddings):
    both = Example("w1 w2 w3 w4 w1", "w4 (w1) w3, w2", 0)
    made = [example for example in augmented([*SINGLES, both], tokenizer(), embeddings, 50, seed=1) if example.text_pair is not None]
    assert len({example.text for example in made}) > 40
    for example in made:
        first, second, third, fourth, again = example.text.split()
        assert first == again
        assert example.text_pair == f"{fourth} ({first}) {third}, {second}"


def test_a_space_counted_to_the_word_behind_it_stays(embeddings):
    """As byte-level tokenizers may count it."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"▁{word}": number + 1 for number, word in enumerate(WORDS)}}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    assert spaced("w1 w2", return_offsets_mapping=True)["offset_mapping"][1] == (2, 5)
    assert augmented(SINGLES, spaced, embeddings, 2, seed=1) == augmented(SINGLES, tokenizer(), embeddings, 2, seed=1)


def test_too_few_words_are_told(embeddings):
    with pytest.raises(UserError, match=r"augment: 15 words of the training split are one token each of .*, it takes more than 15: set it to 0"):
        augmented(SINGLES, tokenizer(WORDS[:15]), embeddings, 1, seed=1)
