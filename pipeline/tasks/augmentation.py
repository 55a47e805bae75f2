"""More texts for a teacher to speak of: copies of training examples in which words give way to others like them.

As TinyBERT has it (Jiao et al. 2020, algorithm 1). There words like a word are GloVe's nearest or what a masked language model puts there; here the
nearest by the model's own token embeddings, among words of the training split that are one token. And there each place is drawn for itself; here a
word gives way wherever an example has it, in both of its texts: else hardly a pair of texts that mean the same stays one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXCHANGED, NEAREST = 0.4, 15
"""The share of an example's words that give way, and to one of how many (Jiao et al. 2020, section 4.2: p_t and K)."""

_WORD = re.compile(r"\w+")
_AT_ONCE = 1024


@dataclass(frozen=True)
class _Word:
    """A place in a text, and the token that lies there."""

    start: int
    end: int
    token: int


def augmented(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, copies: int, seed: int) -> list[Example]:
    """The examples, then `copies` of each, with its label, one pass over the examples after another.

    embeddings: of tokens, [vocabulary, width]. Raises UserError where too few words are one token each.
    """
    texts = list(dict.fromkeys(text for example in examples for text in (example.text, example.text_pair) if text is not None))
    words = dict(zip(texts, _words(texts, tokenizer), strict=True))
    spelt = {word.token: text[word.start : word.end] for text in reversed(texts) for word in reversed(words[text])}
    if len(spelt) <= NEAREST:
        raise UserError(
            f"prune.distillation.augment: {len(spelt)} words of the training split are one token each of {tokenizer.name_or_path}, it takes more than"
            f" {NEAREST}: set it to 0"
        )
    alike = dict(zip(spelt, _nearest(embeddings[list(spelt)], list(spelt)), strict=True))
    draw = np.random.Generator(np.random.Philox(seed))

    def copy(example: Example) -> Example:
        pair = [text for text in (example.text, example.text_pair) if text is not None]
        known = list(dict.fromkeys(word.token for text in pair for word in words[text]))
        drawn = zip(known, draw.random(len(known)), draw.integers(NEAREST, size=len(known)), strict=True)
        given = {token: spelt[alike[token][number]] for token, chance, number in drawn if chance < EXCHANGED}
        text, *other = (_rewritten(text, words[text], given) for text in pair)
        return replace(example, text=text, text_pair=other[0] if other else None)

    return [*examples, *(copy(example) for _ in range(copies) for example in examples)]


def _rewritten(text: str, words: Sequence[_Word], given: Mapping[int, str]) -> str:
    """With what is given in place of these tokens."""
    parts, end = [], 0
    for word in words:
        if word.token in given:
            parts += [text[end : word.start], given[word.token]]
            end = word.end
    return "".join([*parts, text[end:]])


def _words(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[_Word]]:
    """Of each text those that are one token and known. Some tokenizers count the space before a word to its place."""
    found, special = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True), set(tokenizer.all_special_ids)
    for text, tokens, places in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        whole = {match.span() for match in _WORD.finditer(text)}
        bare = ((end - len(text[start:end].lstrip()), end, token) for token, (start, end) in zip(tokens, places, strict=True) if token not in special)
        yield [_Word(*place) for place in bare if place[:2] in whole]


def _nearest(vectors: Tensor, names: Sequence[int]) -> list[list[int]]:
    """Of each its `NEAREST` others, by cosine about the mean."""
    directions = F.normalize((vectors - vectors.mean(0)).float(), dim=1)
    found: list[list[int]] = []
    for first in range(0, len(directions), _AT_ONCE):
        cosines = directions[first : first + _AT_ONCE] @ directions.T
        cosines[torch.arange(len(cosines)), torch.arange(len(cosines)) + first] = -2.0
        found += [[names[number] for number in row] for row in cosines.topk(NEAREST, dim=1).indices.tolist()]
    return found
