from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline import objectives
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM
from pipeline.objectives.candidate_scores import candidate_scores
from pipeline.objectives.meta_controller import MetaController, choice
from pipeline.objectives.settings import MetaControllerSettings, MlmSettings
from tests.objectives.test_mlm import MASK, PAD, batch_of

SHAPE = TrimlineConfig(vocab_size=200, hidden_size=24, head_dim=8, heads_per_layer=[3, 3], ffn_per_layer=[30, 30], dropout=0.0, initializer_range=0.2)


def pair(tokenizer, **settings) -> tuple[TrimlineForMaskedLM, MetaController]:
    torch.manual_seed(0)
    objective = objectives.build(MetaControllerSettings(**{"options": 6, "mask_rate": 0.3, **settings}), tokenizer, seed=1, model=SHAPE)
    return TrimlineForMaskedLM(SHAPE), objective


def forced(model: TrimlineForMaskedLM, sharpness: float) -> TrimlineForMaskedLM:
    """A model, and so a controller, that prefers a few tokens by their bias: candidates repeat."""
    with torch.no_grad():
        model.head.decoder.bias.copy_(torch.randn(200) * sharpness)
    return model


def test_the_papers_worked_example():
    """Vocabulary 24, k 5, two rows of 6 with mask 22 and `<neither>` 23; one hidden token is drawn as it was. Theirs has `<neither>` in the
    vocabulary and overwrites the first candidate with it; here rejecting comes before them, which is the same list."""
    masked = torch.tensor([[0, 5, 22, 7, 22, 2], [0, 22, 10, 2, 1, 1]])
    labels = torch.full_like(masked, -100)
    labels[0, 2], labels[0, 4], labels[1, 1] = 6, 8, 9
    drawn = torch.randint(3, 22, (2, 6, 5))
    drawn[0, 2], drawn[0, 4], drawn[1, 1, 0] = torch.tensor([11, 4, 12, 16, 18]), torch.tensor([8, 8, 13, 19, 5]), 12
    task = choice(masked.flatten(), labels.flatten(), drawn.flatten(0, 1), "keep")
    assert task.corrupted.view(2, 6).tolist() == [[0, 5, 11, 7, 8, 2], [0, 12, 10, 2, 1, 1]]
    assert task.replaced.view(2, 6).long().tolist() == [[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    candidates = torch.cat([torch.full((12, 1), 23), task.others], dim=1).view(2, 6, 5)
    assert candidates[0, 2].tolist() == [23, 6, 12, 16, 18]
    assert candidates[0, 4].tolist() == [23, 8, 13, 19, 5]


def test_losses_weigh_as_the_papers_sum_does(tokenizer):
    """Theirs is the controller's sum over 3 hidden tokens + 50 x 3 / 10 times the choice's sum over 10 tokens, then divided by 3."""
    weights = pair(tokenizer)[1].loss_weights
    total = 11.592292 + weights["choice"] * 58.409416 * 3 / 10
    assert total == pytest.approx(887.733521, abs=1e-4)
    assert 11.592292 / 3 + weights["choice"] * 58.409416 / 10 == pytest.approx(total / 3)


@pytest.mark.parametrize("duplicates", ["exclude", "keep"])
def test_the_truth_is_among_the_options_where_a_token_was_replaced(duplicates):
    torch.manual_seed(0)
    ids, labels = torch.randint(5, 12, (5000,)), torch.full((5000,), -100)
    hidden = torch.rand(5000) < 0.4
    labels[hidden], ids[hidden] = torch.randint(5, 12, (int(hidden.sum()),)), MASK
    drawn = torch.randint(5, 12, (5000, 4))
    task = choice(ids, labels, drawn, duplicates)
    assert torch.equal(task.replaced, hidden & (drawn[:, 0] != labels))
    assert torch.equal(task.corrupted[~hidden], ids[~hidden])
    assert torch.equal(task.corrupted[hidden], drawn[hidden, 0])
    assert torch.equal(task.others[~task.replaced], drawn[~task.replaced, 1:]), "where rejecting is right nothing is changed"
    assert not task.excluded[~task.replaced].any()
    truths = (task.others == labels[:, None]) & ~task.excluded
    assert truths[task.replaced, 0].all()
    if duplicates == "exclude":
        assert (truths[task.replaced].sum(1) == 1).all(), "the truth is an option more than once"
    else:
        assert (truths[task.replaced].sum(1) > 1).any()
        assert not task.excluded.any()


def test_the_score_of_an_option_depends_on_its_token_alone(tokenizer):
    model, objective = pair(tokenizer)
    batch = objective.prepare(batch_of([64, 40]), step=0)
    tokens = batch["attention_mask"] == 1
    _, drawn = objective.fill_in(model, model.head.decoder.bias, batch, 0, tokens)
    task = choice(batch["input_ids"][tokens], batch["labels"][tokens], drawn, "exclude")
    state = torch.randn(len(drawn), 24)
    order = torch.randperm(5)
    shuffled = task._replace(others=task.others[:, order], excluded=task.excluded[:, order])
    one, other = (objective.scores(state, model.get_input_embeddings().weight, model.head.decoder.bias, which) for which in (task, shuffled))
    torch.testing.assert_close(one[:, 0], other[:, 0])
    torch.testing.assert_close(one[:, 1:][:, order], other[:, 1:])


def test_scores_of_candidates_and_their_gradients_are_those_of_the_whole_vocabularys():
    torch.manual_seed(0)
    hidden, weight = torch.randn(333, 8, dtype=torch.float64, requires_grad=True), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    candidates, upstream = torch.randint(0, 20, (333, 7)), torch.randn(333, 7, dtype=torch.float64)
    found, expected = candidate_scores(hidden, weight, candidates), (hidden @ weight.T).gather(1, candidates)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(scores, [hidden, weight], upstream) for scores in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("duplicates", ["exclude", "keep"])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_losses_and_figures_are_those_of_a_plain_loop(tokenizer, duplicates, sharpness):
    model, objective = pair(tokenizer, duplicates=duplicates)
    forced(model, sharpness)
    batch = objective.prepare(batch_of([64, 40, 9, 60, 60]), step=3)
    with torch.no_grad():
        found, counts = objective(model, batch, 3), objective.targets(batch)
    tokens = batch["attention_mask"] == 1
    _, drawn = objective.fill_in(model, model.head.decoder.bias, batch, 3, tokens)
    at = {place: row for row, place in enumerate(map(tuple, tokens.nonzero().tolist()))}
    corrupted = batch["input_ids"].clone()
    for place, row in at.items():
        if batch["labels"][place] != -100:
            corrupted[place] = drawn[row, 0]
    hidden = model.model(corrupted, attention_mask=batch["attention_mask"]).last_hidden_state
    state = model.head.norm(F.gelu(model.head.dense(hidden)))
    state, embedding, bias = state.detach(), model.get_input_embeddings().weight.detach(), model.head.decoder.bias.detach()
    sums, loss = dict.fromkeys(objective.figures, 0), 0.0
    for place, row in at.items():
        truth = int(batch["labels"][place])
        options = [(float(state[place] @ objective.neither.detach() + objective.neither_bias.detach()), None)]
        tail = drawn[row, 1:].tolist()
        replaced = truth not in (-100, int(corrupted[place]))
        if replaced:
            tail = [truth, *(token for token in tail[1:] if token != truth or duplicates == "keep")]
        options += [(float(state[place] @ embedding[token] + bias[token]), token) for token in tail]
        scores = torch.tensor([score for score, _ in options])
        answer = 1 if replaced else 0
        loss += float(scores.logsumexp(0) - scores[answer])
        right = options[int(scores.argmax())][1] == (truth if replaced else None)
        if truth == -100:
            sums["accuracy_shown"] += right
        else:
            sums["replaced" if replaced else "kept"] += 1
            sums["corrected" if replaced else "accepted"] += right
    assert found["choice"].item() == pytest.approx(loss / len(at), rel=1e-5)
    for name, total in sums.items():
        assert round(found[name].item() * int(counts[name])) == total, name
    assert sums["corrected" if sharpness < 1 else "kept"] > 0, "this case shows nothing"


def test_no_gradient_flows_through_what_is_drawn_and_the_embedding_learns_from_both_networks(tokenizer):
    model, objective = pair(tokenizer)
    losses = objective(model, objective.prepare(batch_of([64] * 4), 0), 0)
    embedding = model.get_input_embeddings().weight
    own = list(objective.generator.parameters())
    assert all(gradient is None for gradient in torch.autograd.grad(losses["choice"], own, retain_graph=True, allow_unused=True))
    body = list(model.model.layers.parameters())
    assert all(gradient is None for gradient in torch.autograd.grad(losses["mlm"], body, retain_graph=True, allow_unused=True))
    for name in ("mlm", "choice"):
        for parameter in (embedding, model.head.decoder.bias):
            assert torch.autograd.grad(losses[name], parameter, retain_graph=True)[0].any(), f"{name} does not reach what is shared"
    assert not any(losses[name].requires_grad for name in objective.figures)


def test_padding_rows_beside_and_chunks_change_nothing(tokenizer):
    model, objective = pair(tokenizer)
    prepared = [objective.prepare(batch, 0) for batch in (batch_of([40, 30, 22]), batch_of([40, 30]), batch_of([22], first_segment=2))]
    whole, *parts = ({name: loss.item() for name, loss in objective(model, batch, 0).items()} for batch in prepared)
    counts, *portions = ({name: int(count) for name, count in objective.targets(batch).items()} for batch in prepared)
    for name in whole:
        total = sum(part[name] * portion[name] for part, portion in zip(parts, portions, strict=True))
        assert whole[name] == pytest.approx(total / counts[name], abs=1e-5), name
    cut = {name: tensor[:, :40] if tensor.dim() == 2 else tensor for name, tensor in prepared[0].items()}
    assert (prepared[0]["input_ids"][:, 40:] == PAD).all()
    for other in (objective(model, cut, 0), pair(tokenizer, chunk=7)[1](model, prepared[0], 0)):
        assert {name: loss.item() for name, loss in other.items()} == pytest.approx(whole, abs=1e-5)


def test_a_batch_without_anything_hidden_has_losses_of_0(tokenizer):
    model, objective = pair(tokenizer)
    losses = objective(model, objective.prepare(batch_of([2, 2]), 0), 0)
    assert losses["mlm"].item() == losses["replaced"].item() == 0
    assert all(math.isfinite(loss.item()) for loss in losses.values())


def test_more_options_than_tokens_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"options 201 is more than the vocabulary has, 200 tokens"):
        pair(tokenizer, options=201)


@pytest.mark.parametrize("name", ["electra", "meta_controller"])
def test_a_model_of_another_make_is_refused(tokenizer, name):
    from transformers import RobertaConfig

    from pipeline.objectives.settings import ElectraSettings

    settings = ElectraSettings() if name == "electra" else MetaControllerSettings()
    with pytest.raises(UserError, match=f"objective {name} cannot train a model of type 'roberta'"):
        objectives.build(settings, tokenizer, seed=1, model=RobertaConfig())


def test_from_a_warm_start_the_choice_is_learned_and_gets_harder(tokenizer):
    """A language where each token follows from its neighbours. Model and controller begin with some masked language modelling; then the loss of the
    choice falls far below what the rates of replacing alone give, H(r) + r ln(k - 1), replaced tokens are corrected, and fewer are as the controller
    learns."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "head_dim": 16, "heads_per_layer": [3, 3], "ffn_per_layer": [96, 96], "initializer_range": 0.05}
    config = TrimlineConfig(vocab_size=200, dropout=0.0, positions="tupe-relative", **shape)
    model, rate = TrimlineForMaskedLM(config), 0.25
    mlm = objectives.build(MlmSettings(mask_rate=rate), tokenizer, seed=1)
    objective = objectives.build(MetaControllerSettings(mask_rate=rate), tokenizer, seed=1, model=config)
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=3e-3)
    warm, steps, history = 200, 340, []
    for step in range(steps):
        ids = 5 + (torch.randint(0, 40, (32, 1), generator=torch.Generator().manual_seed(step)) + 7 * torch.arange(12)) % 40
        ids[:, 0], ids[:, -1] = 2, 3
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "segment": step * 32 + torch.arange(32)}
        losses = objective(model, objective.prepare(batch, step), step)
        loss = losses["mlm"] + (mlm(model, mlm.prepare(batch, step), step)["mlm"] if step < warm else 20 * losses["choice"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    first, start, end = (
        {name: sum(step[name] for step in part) / 10 for name in part[0]} for part in (history[:10], history[warm:][:10], history[-10:])
    )
    replaced = rate * end["replaced"] * 10 / 12
    floor = -replaced * math.log(replaced / 9) - (1 - replaced) * math.log(1 - replaced)
    assert end["choice"] < floor / 3 < floor < start["choice"]
    assert start["corrected"] / start["replaced"] < 0.6 < 0.8 < end["corrected"] / end["replaced"]
    assert end["replaced"] < first["replaced"] - 0.08
    assert end["accepted"] / end["kept"] > 0.6
    assert end["accuracy_shown"] > 0.95
