from __future__ import annotations

import pytest
import torch

from pipeline import objectives
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM
from pipeline.objectives.base import Trainee
from pipeline.objectives.mlm import Mlm
from pipeline.objectives.settings import MlmSettings

PAD, CLS, SEP, MASK = 0, 2, 3, 4


def batch_of(lengths: list[int], first_segment: int = 0, length: int = 64) -> dict[str, torch.Tensor]:
    """Rows `[cls] tokens [sep]` of so many tokens in all, padded; the tokens depend on the segment's number."""
    ids = torch.full((len(lengths), length), PAD)
    for row, tokens in enumerate(lengths):
        ids[row, :tokens] = 5 + (torch.arange(tokens) * 7 + first_segment + row) % 195
        ids[row, 0], ids[row, tokens - 1] = CLS, SEP
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "segment": torch.arange(first_segment, first_segment + len(lengths))}


def test_rates_are_those_of_the_settings(tokenizer):
    before = batch_of([64] * 2000)
    after = Mlm(MlmSettings(mask_rate=0.2, mask_token_rate=0.7, random_token_rate=0.2), tokenizer, seed=1).prepare(before, step=3)
    target = after["labels"] != -100
    n = int(target.sum())
    assert n / (2000 * 62) == pytest.approx(0.2, abs=0.005)
    assert torch.equal(after["labels"][target], before["input_ids"][target])
    assert torch.equal(after["input_ids"][~target], before["input_ids"][~target])
    new, old = after["input_ids"][target], before["input_ids"][target]
    assert float((new == MASK).sum()) / n == pytest.approx(0.7, abs=0.02)
    assert float((new == old).sum()) / n == pytest.approx(0.1, abs=0.015)
    random = new[(new != MASK) & (new != old)]
    assert len(random) / n == pytest.approx(0.2, abs=0.02)
    assert random.max() > 190
    assert len(random.unique()) > 150, "random tokens do not cover the vocabulary"


def test_special_tokens_and_padding_are_never_targets(tokenizer):
    before = batch_of([64, 40, 17, 9] * 50)
    before["input_ids"][:, 5] = SEP  # a document ends inside the row
    labels = Mlm(MlmSettings(mask_rate=0.9), tokenizer, seed=1).prepare(before, step=0)["labels"]
    untouchable = (before["attention_mask"] == 0) | (before["input_ids"] < 5)
    assert (labels[untouchable] == -100).all()


def test_masking_depends_on_seed_step_and_segment_alone(tokenizer):
    mlm = Mlm(MlmSettings(), tokenizer, seed=1)
    whole = mlm.prepare(batch_of([64] * 8), step=5)
    for name in ("input_ids", "labels"):
        assert torch.equal(mlm.prepare(batch_of([64] * 8), step=5)[name], whole[name])
        part = mlm.prepare(batch_of([64] * 3, first_segment=4), step=5)
        assert torch.equal(part[name], whole[name][4:7]), "a row's masking depends on the rows beside it"
        assert not torch.equal(mlm.prepare(batch_of([64] * 8), step=6)[name], whole[name])
        assert not torch.equal(Mlm(MlmSettings(), tokenizer, seed=2).prepare(batch_of([64] * 8), step=5)[name], whole[name])


def test_every_row_with_a_token_has_a_target_and_a_row_without_has_none(tokenizer):
    mlm = Mlm(MlmSettings(mask_rate=0.01), tokenizer, seed=1)
    prepared = mlm.prepare(batch_of([3] * 30 + [2]), step=0)
    assert (prepared["labels"] != -100).sum(dim=1).tolist() == [1] * 30 + [0]
    assert mlm.targets(prepared) == {"mlm": 30}
    model = TrimlineForMaskedLM(TrimlineConfig(vocab_size=200, hidden_size=16, head_dim=8, heads_per_layer=[2], ffn_per_layer=[16]))
    empty = mlm.prepare(batch_of([2, 2]), step=0)
    assert mlm(model, empty, 0)["mlm"].item() == 0


def test_prepare_leaves_its_batch_alone(tokenizer):
    batch = batch_of([64] * 4)
    ids = batch["input_ids"].clone()
    Mlm(MlmSettings(), tokenizer, seed=1).prepare(batch, step=0)
    assert torch.equal(batch["input_ids"], ids)
    assert "labels" not in batch


def test_the_loss_is_the_mean_over_the_targets_it_names(tokenizer):
    torch.manual_seed(0)
    mlm = Mlm(MlmSettings(), tokenizer, seed=1)
    model = TrimlineForMaskedLM(TrimlineConfig(vocab_size=200, hidden_size=16, head_dim=8, heads_per_layer=[2], ffn_per_layer=[16])).eval()
    whole, one, two = (mlm.prepare(batch, 0) for batch in (batch_of([64] * 6), batch_of([64] * 2), batch_of([64] * 4, first_segment=2)))
    parts = sum(mlm(model, part, 0)["mlm"] * mlm.targets(part)["mlm"] for part in (one, two))
    assert torch.allclose(mlm(model, whole, 0)["mlm"], parts / mlm.targets(whole)["mlm"], atol=1e-5)


def test_documents_of_a_row_are_predicted_apart(tokenizer):
    torch.manual_seed(0)
    mlm = Mlm(MlmSettings(mask_rate=0.3), tokenizer, seed=1)
    shape = {"hidden_size": 16, "head_dim": 8, "heads_per_layer": [2], "ffn_per_layer": [16], "initializer_range": 0.5}
    model = TrimlineForMaskedLM(TrimlineConfig(vocab_size=200, **shape)).eval()
    documents = (torch.arange(64) >= 40).long().expand(4, 64)
    prepared = mlm.prepare({**batch_of([64] * 4), "document_ids": documents}, step=0)
    parts = [{name: prepared[name][:, at] for name in ("input_ids", "attention_mask", "labels")} for at in (slice(40), slice(40, 64))]
    total = sum(mlm(model, part, 0)["mlm"] * mlm.targets(part)["mlm"] for part in parts)
    assert torch.allclose(mlm(model, prepared, 0)["mlm"], total / mlm.targets(prepared)["mlm"], atol=1e-5)
    del prepared["document_ids"]
    assert not torch.allclose(mlm(model, prepared, 0)["mlm"], total / mlm.targets(prepared)["mlm"], atol=1e-3)


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="objective mlm needs a mask token"):
        objectives.build(MlmSettings(), tokenizer, seed=1)


def test_a_tiny_encoder_learns_a_toy_language(tokenizer):
    """Every token is the one before it plus seven, so a masked one follows from its neighbours."""
    torch.manual_seed(0)
    config = TrimlineConfig(vocab_size=200, hidden_size=64, head_dim=32, heads_per_layer=[2, 2], ffn_per_layer=[128, 128], dropout=0.0)
    trainee = Trainee(TrimlineForMaskedLM(config), objectives.build(MlmSettings(), tokenizer, seed=1))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=3e-3)
    losses = []
    for step in range(250):
        batch = trainee.prepare(batch_of([24] * 32, first_segment=32 * (step % 6), length=24), step)
        loss = trainee(batch, step)["mlm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5  # log 200 = 5.3 nats
    assert sum(losses[-10:]) / 10 < 2.5
