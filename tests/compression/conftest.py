import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM, TrimlineForSequenceClassification

SPECIALS = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


@pytest.fixture(scope="module")
def tokenizer():
    words = [*SPECIALS.values(), *(f"w{number}" for number in range(45))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIALS)


@pytest.fixture
def encoder():
    """Makes a model of 3 layers (4 heads of 8, 48 neurons) with weights large enough for every unit to show in the logits."""

    def make(norm="post", labels=3, dropout=0.0, seed=0, positions="absolute", kind=TrimlineForSequenceClassification):
        torch.manual_seed(seed)
        config = TrimlineConfig(
            vocab_size=50,
            hidden_size=32,
            head_dim=8,
            heads_per_layer=[4, 4, 4],
            ffn_per_layer=[48, 48, 48],
            kind="decoder" if kind is TrimlineForCausalLM else "encoder",
            norm=norm,
            positions=positions,
            dropout=dropout,
            max_position_embeddings=16,
            initializer_range=0.2,
            num_labels=labels,
        )
        model = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
        return model

    return make
