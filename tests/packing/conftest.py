from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.corpus.store import Store, Writer


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
