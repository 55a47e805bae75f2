from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")


def tokenizer(second_type=0):
    """One token a word `w0` ... `w99`, number 5 and up; rows are `<s> a </s>` and `<s> a </s> b </s>`."""
    words = [*SPECIALS, *(f"w{number}" for number in range(100))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=f"<s> $A </s> $B:{second_type} </s>:{second_type}", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>", **roles)


@pytest.fixture(scope="session")
def make_tokenizer():
    return tokenizer
