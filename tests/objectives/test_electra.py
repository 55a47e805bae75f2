from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline import objectives
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineModel
from pipeline.objectives.electra import Electra
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import ElectraSettings, NotesSettings
from tests.objectives.test_mlm import MASK, batch_of

SHAPE = TrimlineConfig(vocab_size=200, hidden_size=24, head_dim=8, heads_per_layer=[3, 3], ffn_per_layer=[30, 30], dropout=0.0, initializer_range=0.2)


def pair(tokenizer, **settings) -> tuple[TrimlineModel, Electra]:
    """The bias of the generator prefers a few tokens, so that it sometimes draws the truth."""
    torch.manual_seed(0)
    objective = objectives.build(ElectraSettings(**{"mask_rate": 0.3, **settings}), tokenizer, seed=1, model=SHAPE)
    with torch.no_grad():
        objective.generator.bias.copy_(torch.randn(200) * 3)
    return TrimlineModel(SHAPE, add_pooling_layer=False), objective


def test_every_hidden_token_is_a_mask_token_to_the_generator(tokenizer):
    before = batch_of([64] * 20)
    after = pair(tokenizer)[1].prepare(before, step=0)
    hidden = after["labels"] != -100
    assert (after["input_ids"][hidden] == MASK).all()
    assert torch.equal(after["input_ids"][~hidden], before["input_ids"][~hidden])


def test_losses_and_figures_are_those_of_a_plain_loop(tokenizer):
    model, objective = pair(tokenizer)
    batch = objective.prepare(batch_of([64, 40, 9, 60]), step=3)
    with torch.no_grad():
        found, counts = objective(model, batch, 3), objective.targets(batch)
        hidden = batch["labels"] != -100
        _, drawn = objective.fill_in(model, None, batch, 3, hidden)
        corrupted, places = batch["input_ids"].clone(), hidden.nonzero().tolist()
        for (row, place), token in zip(places, drawn[:, 0], strict=True):
            corrupted[row, place] = token
        scores = objective.head(model(corrupted, batch["attention_mask"]).last_hidden_state).squeeze(-1)
    sums, loss = dict.fromkeys(objective.figures, 0), 0.0
    for row, place in batch["attention_mask"].nonzero().tolist():
        truth = int(batch["labels"][row, place])
        replaced = truth not in (-100, int(corrupted[row, place]))
        loss += float(F.softplus(-scores[row, place] if replaced else scores[row, place]))
        sums["replaced" if replaced else "original"] += 1
        if (scores[row, place] > 0) == replaced:
            sums["found" if replaced else "trusted"] += 1
    assert found["discriminate"].item() == pytest.approx(loss / int(batch["attention_mask"].sum()), rel=1e-5)
    for name, total in sums.items():
        assert round(found[name].item() * int(counts[name])) == total, name
    assert 0 < sums["replaced"] < len(places), "no hidden token was drawn as it was"


def test_no_gradient_flows_through_what_is_drawn_and_the_embedding_learns_from_both_networks(tokenizer):
    model, objective = pair(tokenizer)
    losses = objective(model, objective.prepare(batch_of([64] * 4), 0), 0)
    own = list(objective.generator.parameters())
    assert all(gradient is None for gradient in torch.autograd.grad(losses["discriminate"], own, retain_graph=True, allow_unused=True))
    for name in ("mlm", "discriminate"):
        assert torch.autograd.grad(losses[name], model.get_input_embeddings().weight, retain_graph=True)[0].any()
    assert objective.loss_weights == {"discriminate": 50.0}
    every = {name for name, parameter in [*objective.named_parameters()] if parameter.requires_grad}
    sum(losses[name] for name in ("mlm", "discriminate")).backward()
    assert {name for name, parameter in objective.named_parameters() if parameter.grad is not None} == every


def test_padding_rows_beside_and_chunks_change_nothing(tokenizer):
    model, objective = pair(tokenizer)
    prepared = [objective.prepare(batch, 0) for batch in (batch_of([40, 30, 22]), batch_of([40, 30]), batch_of([22], first_segment=2))]
    whole, *parts = ({name: loss.item() for name, loss in objective(model, batch, 0).items()} for batch in prepared)
    counts, *portions = ({name: int(count) for name, count in objective.targets(batch).items()} for batch in prepared)
    for name in whole:
        total = sum(part[name] * portion[name] for part, portion in zip(parts, portions, strict=True))
        assert whole[name] == pytest.approx(total / counts[name], abs=1e-5), name
    cut = {name: tensor[:, :40] if tensor.dim() == 2 else tensor for name, tensor in prepared[0].items()}
    for other in (objective(model, cut, 0), pair(tokenizer, chunk=7)[1](model, prepared[0], 0)):
        assert {name: loss.item() for name, loss in other.items()} == pytest.approx(whole, abs=1e-5)


def test_documents_of_a_row_are_read_apart_by_both_networks(tokenizer):
    model, objective = pair(tokenizer)
    documents = (torch.arange(64) >= 40).long().expand(4, 64)
    prepared = objective.prepare({**batch_of([64] * 4), "document_ids": documents}, step=0)
    prepared["labels"] = prepared["labels"].masked_fill(documents == 1, -100)  # what is said about the first document alone
    changed = {**prepared, "input_ids": torch.where(documents == 1, 9, prepared["input_ids"])}
    for names, same in ((prepared.keys(), True), (prepared.keys() - {"document_ids"}, False)):
        pairs = [{name: which[name] for name in names} for which in (prepared, changed)]
        assert torch.allclose(*(objective.read(model, which, which["input_ids"])[:, :40] for which in pairs), atol=1e-5) is same
        assert torch.allclose(*(objective(model, which, 0)["mlm"] for which in pairs), atol=1e-5) is same


def test_a_batch_without_anything_hidden_has_losses_of_0(tokenizer):
    model, objective = pair(tokenizer)
    losses = objective(model, objective.prepare(batch_of([2, 2]), 0), 0)
    assert losses["mlm"].item() == losses["replaced"].item() == 0
    assert losses["discriminate"].item() > 0


def test_a_temperature_near_0_draws_the_likeliest_token(tokenizer):
    model, objective = pair(tokenizer, generator={"temperature": 1e-6})
    batch = objective.prepare(batch_of([64] * 4), 0)
    _, drawn = objective.fill_in(model, None, batch, 0, batch["labels"] != -100)
    assert len(drawn.unique()) < 5, "the bias alone prefers a few tokens"
    drawn_hot = pair(tokenizer, generator={"temperature": 100.0})[1].fill_in(model, None, batch, 0, batch["labels"] != -100)[1]
    assert len(drawn_hot.unique()) > 40


def noted(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a rare word of one token, number 1, at place 10 of each row; it is never hidden."""
    word = torch.arange(64).expand_as(batch["input_ids"]).masked_fill(batch["attention_mask"] == 0, -1)
    occurrences = torch.tensor([[[1, 10, 11, 1, 63]]]).expand(len(word), -1, -1)
    note = torch.full_like(word, -1)
    note[:, 10] = 1
    shown = torch.where(batch["labels"][:, 10] == -100, batch["input_ids"][:, 10], batch["labels"][:, 10])
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    ids[:, 10], labels[:, 10] = shown, -100
    return {**batch, "input_ids": ids, "labels": labels, "word": word, "note": note, "occurrences": occurrences}


def test_notes_are_read_by_both_networks_and_written_from_the_filled_in_rows(tokenizer):
    found = {}
    for weight in (None, 0.0, 0.5):
        model, objective = pair(tokenizer)
        batch = noted(objective.prepare(batch_of([64] * 4), 0))
        if weight is not None:
            objective.take_notes(Notes(NotesSettings(weight=weight, decay=1.0, window=0), 3, 24, seed=1))
            objective.notes.table.normal_()
        found[weight] = {name: loss.item() for name, loss in objective(model, batch, 0).items()}
    assert found[None] == found[0.0]
    assert all(found[0.5][name] != found[None][name] for name in ("mlm", "discriminate"))
    assert not any("notes" in name for name, _ in objective.named_modules())

    hidden, before = batch["labels"] != -100, objective.notes.table.clone()
    _, drawn = objective.fill_in(model, None, batch, 0, hidden)
    corrupted = batch["input_ids"].masked_scatter(hidden, drawn)
    states = model(corrupted, batch["attention_mask"], input_mixer=objective.notes.mixer(batch)).last_hidden_state
    projected = objective.generator.project(before[1])
    mixed = objective.notes.mixer(batch, objective.generator.project)(torch.zeros(4, 64, 8))
    torch.testing.assert_close(mixed[:, 10], (0.5 * projected).expand(4, -1))
    number, taken, _ = objective.notes._taken[0]
    assert number.tolist() == [1] * 4
    torch.testing.assert_close(taken, states[:, 10])
