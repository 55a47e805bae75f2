from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM
from pipeline.objectives.generator import Generator, shape
from pipeline.objectives.sampling import sample
from pipeline.objectives.settings import GeneratorSettings
from pipeline.packing.draws import uniform

BASE = TrimlineConfig(vocab_size=30522, hidden_size=768, head_dim=64, heads_per_layer=[12] * 12, ffn_per_layer=[3072] * 12, initializer_range=0.03)
SMALL = TrimlineConfig(vocab_size=97, hidden_size=24, head_dim=8, heads_per_layer=[3, 3], ffn_per_layer=[30, 30], dropout=0.0, initializer_range=0.3)


def draws(rows: int, k: int, segment: int = 0) -> torch.Tensor:
    """Uniform numbers [rows, 2 k] for `sample`."""
    return torch.cat([uniform(1, 2, torch.tensor([segment]), rows, stream).T for stream in range(2 * k)], dim=1)


def masked_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, attention = torch.randint(5, 97, (4, 12)), torch.ones(4, 12, dtype=torch.int64)
    attention[1, 7:] = 0
    labels = torch.where((torch.rand(4, 12) < 0.3) & (attention == 1), ids, -100)
    return {"input_ids": ids.masked_fill(labels != -100, 4), "attention_mask": attention, "labels": labels}


def test_of_bert_base_it_is_the_papers_size():
    config = shape(GeneratorSettings(), BASE)
    assert (config.hidden_size, config.heads_per_layer, config.ffn_per_layer) == (256, [4] * 12, [1024] * 12)
    assert (config.vocab_size, config.initializer_range, config.norm, config.positions) == (0, 0.03, BASE.norm, BASE.positions)
    assert BASE.hidden_size == 768, "the model's own configuration was changed"


def test_its_size_can_be_set_up_to_the_models():
    config = shape(GeneratorSettings(layers=6, heads=12, ffn=3072), BASE)
    assert (config.hidden_size, config.heads_per_layer, config.ffn_per_layer) == (768, [12] * 6, [3072] * 6)
    with pytest.raises(UserError, match=r"generator: layers 13 \(the model has 12\), ffn 4096 \(the model has 3072\): it must not be larger"):
        shape(GeneratorSettings(layers=13, ffn=4096), BASE)


def test_what_is_drawn_follows_the_softmax_at_its_temperature():
    torch.manual_seed(0)
    hidden, weight, bias, rows = torch.randn(2, 8), torch.randn(50, 8), torch.randn(50), 50_000
    for at, temperature in ((0, 1.0), (1, 1.7)):
        drawn = sample(hidden[at].expand(rows, -1), weight, bias, draws(rows, 3), temperature=temperature, chunk=999)
        expected = ((weight @ hidden[at] + bias) / temperature).softmax(0)
        found = torch.bincount(drawn.flatten(), minlength=50)
        chi_square = ((found - 3 * rows * expected) ** 2 / (3 * rows * expected)).sum()
        assert chi_square < 85.4, "49 degrees of freedom exceed this once in 1000 times"
        pairs = torch.zeros(50, 50).index_put_((drawn[:, 0], drawn[:, 2]), torch.tensor(1 / rows), accumulate=True)
        assert (pairs - expected[:, None] * expected).abs().max() < 5e-3, "two tokens drawn at a place are not independent"


@pytest.mark.parametrize("vocabulary", [2, 5, 97, 1000])
def test_drawing_inverts_the_distribution_function_block_by_block(vocabulary):
    """Against a plain loop in fp64."""
    torch.manual_seed(0)
    hidden, weight, bias, numbers = torch.randn(40, 6), torch.randn(vocabulary, 6), torch.randn(vocabulary), draws(40, 4)
    drawn = sample(hidden, weight, bias, numbers, temperature=0.7)
    block = 1
    while block * block < vocabulary:
        block *= 2
    for n in range(40):
        weights = ((weight.double() @ hidden[n].double() + bias.double()) / 0.7).softmax(0)
        blocks = weights.split(block)
        for j in range(4):
            masses = torch.stack([part.sum() for part in blocks])
            chosen = int((masses.cumsum(0) <= numbers[n, j]).sum())
            within = blocks[chosen].cumsum(0) / blocks[chosen].sum()
            assert drawn[n, j] == chosen * block + int((within <= numbers[n, 4 + j]).sum())


def test_drawing_does_not_depend_on_chunks():
    torch.manual_seed(0)
    hidden, weight, bias, numbers = torch.randn(200, 16), torch.randn(500, 16), torch.randn(500), draws(200, 5)
    whole = sample(hidden, weight, bias, numbers)
    for chunk in (1, 7, 64):
        assert torch.equal(sample(hidden, weight, bias, numbers, chunk=chunk), whole)


def test_a_token_of_no_probability_is_never_drawn():
    bias = torch.full((97,), -1e4)
    bias[[5, 96]] = 0.0
    drawn = sample(torch.zeros(3000, 4), torch.zeros(97, 4), bias, draws(3000, 2))
    assert set(drawn.flatten().tolist()) == {5, 96}
    edges = torch.tensor([[0.0, 1 - 2**-24, 0.0, 1 - 2**-24]])
    assert sample(torch.zeros(1, 4), torch.zeros(97, 4), bias, edges).tolist() == [[5, 96]]


def test_its_loss_is_that_of_a_masked_language_model_whose_embedding_is_projected():
    torch.manual_seed(0)
    model, generator, batch = TrimlineForMaskedLM(SMALL), Generator(GeneratorSettings(), SMALL, own_bias=False, chunk=5), masked_batch()
    with torch.no_grad():
        model.head.decoder.bias.normal_()
    embedding, bias = model.get_input_embeddings().weight, model.head.decoder.bias
    where = batch["labels"] != -100
    loss, drawn = generator(embedding, bias, batch, where, draws(int(where.sum()), 1))
    table = generator.project(embedding)
    hidden = generator.body(inputs_embeds=generator.project(embedding[batch["input_ids"]]), attention_mask=batch["attention_mask"]).last_hidden_state
    logits = generator.transform(hidden) @ table.T + bias
    plain = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(loss, plain)
    assert drawn.shape == (int(where.sum()), 1)
    shared = [embedding, bias, generator.project.weight]
    found, expected = (torch.autograd.grad(which, shared) for which in (loss, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
