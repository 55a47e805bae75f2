from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.compression.surgery import remove
from pipeline.models.modeling_trimline import TrimlineConfig

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Twenty words and the five special tokens, as Trimline's own tokenizers number them."""
    words = [*SPECIALS, *(f"w{number}" for number in range(20))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>", **roles)


def config(**changes: Any) -> TrimlineConfig:
    shape = {"vocab_size": 40, "hidden_size": 32, "head_dim": 8, "heads_per_layer": [4, 4], "ffn_per_layer": [48, 48], "max_position_embeddings": 16}
    # A wide initialisation makes every part matter in the outputs that tests compare.
    return TrimlineConfig(**{**shape, "initializer_range": 0.3, "bos_token_id": 2, "eos_token_id": 3, **changes})


@pytest.fixture
def make_config() -> Any:
    return config


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [3, 12] and attention mask: rows of 12, 9 and 5 tokens."""
    mask = (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()
    return torch.randint(5, 40, (3, 12)) * mask, mask


@pytest.fixture
def pruned() -> Any:
    """Takes of a model of two layers the first one's feed-forward block, the second one's attention, two heads, a third of the neurons and, where
    they can go, five dimensions; the rest is scaled."""

    def prune(model: Any) -> Any:
        masks = {"heads": torch.tensor([[0, 1, 0, 0.7], [1, 1, 1, 1]]), "neurons": torch.arange(96).reshape(2, 48) % 3 / 2}
        masks |= {"attention": torch.tensor([0.9, 0]), "feedforward": torch.tensor([0, 0.8])}
        dimensions = {} if model.config.positions == "sinusoidal" else {"hidden": torch.cat([torch.zeros(5), torch.ones(27)])}
        return remove(model, masks | dimensions)

    return prune
