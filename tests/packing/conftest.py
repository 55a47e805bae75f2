from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.settings import Specification
from pipeline.corpus.store import Store, Writer

SENTENCE = "The model reads a long text and learns which word (e.g. Doge's, MODELS, x_1) comes next: 1,000 words, while don't end-of-line."


@pytest.fixture(scope="session")
def make_store(tmp_path_factory):
    """A token store of two shards: document d holds the tokens 100 * d + 10, 100 * d + 11, ..., so that every token says where it is from."""

    def make(lengths):
        directory = tmp_path_factory.mktemp("store")
        documents = [100 * d + 10 + np.arange(length) for d, length in enumerate(lengths)]
        for shard, part in enumerate((documents[:3], documents[3:])):
            with Writer(directory / f"{shard:05}", np.uint16) as writer:
                for document in part:
                    writer.add(document)
        return Store.open(directory)

    return make


@pytest.fixture(scope="session")
def make_tokenizer():
    """What packing asks of a tokenizer."""

    def make(**changes):
        roles = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "bos": 2, "eos": 3} | changes
        vocab = {"a": 0, "b": 1}
        return SimpleNamespace(**{f"{role}_token_id": number for role, number in roles.items()}, get_vocab=lambda: vocab)

    return make


@pytest.fixture(scope="session")
def store_of(tmp_path_factory):
    """A token store of these documents."""

    def make(documents):
        directory = tmp_path_factory.mktemp("store")
        with Writer(directory / "00000", np.uint16) as writer:
            for document in documents:
                writer.add(document)
        return Store.open(directory)

    return make


@pytest.fixture(scope="session")
def hash_of():
    """A word's hash, written out."""

    def polynomial(word):
        value = 0
        for letter in word:
            value = (value * 0x9E3779B97F4A7C15 + ord(letter)) % 2**64
        return value

    return polynomial


def by_library(kind, texts):
    """GPT-2's and BERT's kinds of tokenizer, as the `tokenizers` library trains them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        split_special_tokens=True,
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tokenizer of each kind, by its name."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices(SENTENCE.split(), k=40)) + f" größer É 日本 {number}" for number in range(300)]
    root = tmp_path_factory.mktemp("tokenizers")
    found = {kind: by_library(kind, texts) for kind in ("byte-level", "wordpiece")}
    for kind in ("unigram", "bpe", "bytes", "words"):
        tokenizers.train(Specification(kind=kind, vocab_size=420), texts, root / kind)
        found[kind] = tokenizers.load(root / kind)
    return found
