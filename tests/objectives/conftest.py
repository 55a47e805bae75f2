from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SPECIALS = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Five special tokens, then words w5 to w199 whose ids are their numbers."""
    words = [*SPECIALS.values(), *(f"w{number}" for number in range(5, 200))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIALS)
