"""Text written with memories: the distribution of each place in plain numpy, copies of what memory holds, the same text again."""

import itertools

import numpy as np
import pytest
import torch

from pipeline.memory import generation
from pipeline.memory.generation import Setting, write
from pipeline.memory.kinds import Memory
from pipeline.memory.sampling import Sampling
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM

VALUES = {"temperature": 0.8, "bias": 0.5, "store_temperature": 0.7, "store_bias": 0.2, "neighbours": 5, "knn_temperature": 0.5, "knn_weight": 0.4}
PROMPT = np.random.default_rng(0).integers(5, 23, size=21).tolist()


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    shape = {"vocab_size": 23, "hidden_size": 16, "head_dim": 8, "heads_per_layer": [2, 2], "ffn_per_layer": [24, 24]}
    config = TrimlineConfig(**shape, kind="decoder", norm="pre", dropout=0.0, max_position_embeddings=32, initializer_range=0.4)
    return CausalReader(TrimlineForCausalLM(config).eval())


def taught(reader, tokens):
    """A datastore of every entry of one text."""
    with torch.no_grad():
        keys = reader.read(input_ids=torch.tensor([tokens[:-1]]))[1][0]

    class Store:
        def search(self, queries, k):
            scores, found = (queries @ keys.T / 4).topk(min(k, len(keys)))
            return scores, torch.tensor(tokens[1:])[found]

    return Store()


def setting(name, reader, **changes):
    chosen = {
        "memory": Memory.of(name),
        "values": VALUES,
        "block": 4,
        "context": 4,
        "long_size": 1000,
        "store": taught(reader, [5, 6, 7, 8, 9, 10, 11]),
    }
    return Setting(**(chosen | changes))


def states(reader, tokens):
    with torch.no_grad():
        hidden, memory = reader.read(input_ids=torch.tensor([tokens]))
        return reader.logits(hidden)[0].double().numpy(), memory[0].double().numpy()


@pytest.mark.parametrize("length", [3, 8, 9, 21])
def test_the_next_token_is_told_by_the_window_what_left_it_and_the_store(reader, length):
    """Windows of 8 tokens that move on by 4: what left them is in long memory with the keys it had in them."""
    prompt, begin, entries = PROMPT[:length], 0, []
    while length - begin > 8:
        keys = states(reader, prompt[begin : begin + 8])[1]
        entries += [(keys[s], prompt[begin + s + 1], 0.8, 0.5) for s in range(4)]
        begin += 4
    logits, keys = states(reader, prompt[begin:])
    entries += [(keys[s], prompt[begin + s + 1], 0.8, 0.0) for s in range(length - begin - 1)]
    scores, values = taught(reader, [5, 6, 7, 8, 9, 10, 11]).search(torch.from_numpy(keys[-1:]).float(), 5)
    mass = np.exp(logits[-1])
    for key, value, temperature, bias in entries:
        mass[value] += np.exp(key @ keys[-1] / 4 / temperature - bias)
    for score, value in zip(scores[0].double().numpy(), values[0].tolist(), strict=True):
        mass[value] += np.exp(score / 0.7 - 0.2)
    text = generation._Text(reader, setting("local+long+external", reader), list(prompt), "cpu")
    found = generation.log_distribution(Memory.of("local+long+external"), text.place(), VALUES)
    np.testing.assert_allclose(np.exp(found), mass / mass.sum(), atol=1e-5)


def test_a_store_that_holds_the_continuation_is_copied(reader):
    text = np.random.default_rng(3).permutation(np.arange(5, 23)).tolist()
    cold = VALUES | {"knn_temperature": 0.05, "knn_weight": 0.98, "neighbours": 3}
    with_store = setting("knn", reader, values=cold, store=taught(reader, text), block=32, context=0)
    prompt, rest = text[:6], text[6:]
    assert list(itertools.islice(write(reader, prompt, with_store, Sampling(greedy=True)), len(rest))) == rest
    without = setting("none", reader, block=32, context=0)
    assert list(itertools.islice(write(reader, prompt, without, Sampling(greedy=True)), len(rest))) != rest


def test_the_same_seed_writes_the_same_text_and_another_seed_another(reader):
    def written(seed):
        return list(itertools.islice(write(reader, PROMPT, setting("local+long", reader), Sampling(seed=seed)), 30))

    assert written(1) == written(1)
    assert written(1) != written(2)


def test_long_memory_holds_no_more_than_its_size(reader):
    text = generation._Text(reader, setting("long", reader, long_size=6), list(PROMPT), "cpu")
    text.place()
    assert text.left is not None
    assert [len(side) for side in text.left] == [6, 6]
    assert text.left[1].tolist() == PROMPT[text.begin - 5 : text.begin + 1]


def test_it_ends_with_the_end_token(reader):
    class Ends:
        def search(self, queries, k):
            return torch.full((1, 1), 30.0), torch.full((1, 1), 3)

    certain = setting("knn", reader, values=VALUES | {"knn_weight": 0.99}, store=Ends())
    assert list(write(reader, PROMPT, certain, Sampling(greedy=True), end=3)) == [3]
