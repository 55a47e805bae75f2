"""TRIME's loss against the original code's numbers and the properties that define it; the objectives' memories, entry by entry.

trime.npz: inputs and outputs of the authors' code in fp64. `x` and `reps_TBC` are hidden and memory states; `token_loss` in nats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pipeline import objectives
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM
from pipeline.objectives.base import Trainee
from pipeline.objectives.memory_scores import log_sums
from pipeline.objectives.settings import TrimeExtSettings, TrimeLongSettings, TrimeSettings
from pipeline.objectives.trime import joint_loss, trime_loss, trime_loss_of_states

VECTORS = np.load(Path(__file__).with_name("trime.npz"))
LENGTH = 9


def vector(name: str, *keys: str) -> list[Tensor]:
    return [torch.from_numpy(VECTORS[f"{name}/{key}"]) for key in keys]


def states(name: str) -> Tensor:
    """Memory states [N, d], row after row."""
    (reps,) = vector(name, "reps_TBC")
    return reps.transpose(0, 1).reshape(-1, reps.shape[-1]).clone().requires_grad_()


def visibility(kind: str, rows: int, length: int) -> Tensor:
    index = torch.arange(rows * length)
    past, same = index < index[:, None], index // length == (index // length)[:, None]
    return {"local": past & same, "long": past, "ext_p0": ~same | past, "ext_p1": ~same}[kind]


KINDS = {
    "local_adaptive": "local", "local_padded_last_row": "local", "local_plain_softmax": "local", "local_B1_L1_nomemory": "local",
    "long_same_device": "long", "ext_world1_p0_local_enabled": "ext_p0", "ext_world1_p1_local_disabled": "ext_p1",
}  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize("name", KINDS)
def test_the_original_codes_losses_and_gradients_of_memory(name, chunk):
    target, cross_entropy, expected, partition, grad_reps = vector(name, "target", "ce_token_loss", "token_loss", "norm_t", "grad_reps")
    reps, targets, visible = states(name), target.flatten(), visibility(KINDS[name], *target.shape)

    def block(groups: slice, rows: slice) -> Tensor:
        return visible[rows][None]

    sums = log_sums(reps[None], targets[None], reps[None], targets[None], block, scale=reps.shape[1] ** -0.5, chunk=chunk)
    loss = joint_loss(partition, partition - cross_entropy, *(found[0] for found in sums))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(reps.grad.view(*target.shape, -1).transpose(0, 1), grad_reps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("name", ["local_plain_softmax", "local_B1_L1_nomemory"])
def test_the_original_codes_losses_and_gradients_from_logits_and_from_hidden_states(name, chunk):
    target, embedding, expected, grad_x, grad_reps = vector(name, "target", "output_embedding", "token_loss", "grad_x", "grad_reps")
    visible, targets = visibility("local", *target.shape), target.flatten()
    for of_states in (False, True):
        (x,) = vector(name, "x")
        x, reps = x.flatten(0, 1).clone().requires_grad_(), states(name)
        memory = (reps, targets, lambda start, stop: visible[start:stop])
        if of_states:
            loss = trime_loss_of_states(x, embedding, targets, reps, *memory, chunk=chunk)
        else:
            loss = trime_loss(x @ embedding.T, targets, reps, *memory, chunk=chunk)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        loss.sum().backward()
        torch.testing.assert_close(x.grad.view_as(grad_x), grad_x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reps.grad.view(*target.shape, -1).transpose(0, 1), grad_reps, rtol=1e-5, atol=1e-5)


def example(n: int = 12, m: int = 15, vocabulary: int = 7, d: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "vocab_logits": torch.randn(n, vocabulary, dtype=dtype, requires_grad=True),
        "targets": torch.randint(vocabulary, (n,)),
        "queries": torch.randn(n, d, dtype=dtype, requires_grad=True),
        "memory_keys": torch.randn(m, d, dtype=dtype, requires_grad=True),
        "memory_targets": torch.randint(vocabulary, (m,)),
        "visible": torch.rand(n, m) < 0.6,
    }


def naive(vocab_logits, targets, queries, memory_keys, memory_targets, visible, scale=None) -> Tensor:
    """Equation 5, word by word."""
    losses = []
    for row, target in enumerate(targets):
        weights = vocab_logits[row].exp()
        for entry in visible[row].nonzero().flatten():
            score = queries[row] @ memory_keys[entry] * (queries.shape[1] ** -0.5 if scale is None else scale)
            weights = weights.index_add(0, memory_targets[entry, None], score.exp()[None])
        losses.append(weights.sum().log() - weights[target].log())
    return torch.stack(losses)


@hypothesis_settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), chunk=st.sampled_from([None, 1, 3, 12, 50]), scale=st.sampled_from([None, 0.3]))
def test_dense_and_chunked_are_equation_5_with_all_its_gradients(seed, chunk, scale):
    inputs = example(seed=seed)
    tensors = [inputs[name] for name in ("vocab_logits", "queries", "memory_keys")]
    weights = torch.rand(12, dtype=torch.float64)
    expected = naive(**inputs, scale=scale)
    gradients = torch.autograd.grad(expected @ weights, tensors)
    found = trime_loss(**inputs, scale=scale, chunk=chunk)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found @ weights, tensors), gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_hidden_states_and_output_embedding_in_chunks():
    inputs = example()
    torch.manual_seed(1)
    hidden, embedding, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((12, 5), (7, 5), (7,)))
    memory = {name: value for name, value in inputs.items() if name != "vocab_logits"}
    whole = trime_loss(hidden @ embedding.T + bias, **memory)
    parts = trime_loss_of_states(hidden, embedding, bias=bias, **memory, chunk=5)
    torch.testing.assert_close(parts, whole)
    gradients = [torch.autograd.grad(loss.square().sum(), [hidden, embedding, bias]) for loss in (whole, parts)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("entries", [15, 0])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_row_that_sees_no_memory_has_exactly_the_cross_entropy(chunk, entries):
    inputs = example(m=entries, dtype=torch.float32)
    inputs["visible"][3:7] = False
    loss = trime_loss(**inputs, chunk=chunk)
    logits, targets = inputs["vocab_logits"], inputs["targets"]
    cross_entropy = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    assert torch.equal(loss[3:7], cross_entropy[3:7])
    torch.testing.assert_close(cross_entropy, F.cross_entropy(logits, targets, reduction="none"))
    loss[3:7].sum().backward()
    assert torch.equal(inputs["queries"].grad, torch.zeros_like(inputs["queries"]))
    assert torch.equal(inputs["memory_keys"].grad, torch.zeros_like(inputs["memory_keys"]))
    torch.testing.assert_close(logits.grad[3:7], logits[3:7].softmax(1) - F.one_hot(targets[3:7], 7), atol=1e-6, rtol=1e-5)


def test_a_target_absent_from_memory_pays_for_the_memorys_share():
    inputs = example()
    inputs["memory_targets"] = (inputs["targets"][0] + 1 + torch.randint(6, (15,))) % 7
    logits = inputs["vocab_logits"][0]
    memory = (inputs["memory_keys"] @ inputs["queries"][0] / 2)[inputs["visible"][0]].exp().sum()
    expected = logits.logsumexp(0) - logits[inputs["targets"][0]] + (1 + memory / logits.exp().sum()).log()
    torch.testing.assert_close(trime_loss(**inputs)[0], expected)


def test_the_probabilities_of_all_words_sum_to_one():
    inputs = example()
    total = sum(torch.exp(-trime_loss(**{**inputs, "targets": torch.full((12,), word)})) for word in range(7))
    torch.testing.assert_close(total, torch.ones(12, dtype=torch.float64))


def test_scores_beyond_the_range_of_exp_leave_loss_and_gradients_exact():
    """The only entries with the target lie hundreds of nats below the best: their sum underflows unless it is taken by itself."""
    inputs = example(dtype=torch.float32)
    with torch.no_grad():
        inputs["queries"] *= 300
    inputs["visible"][:] = True
    precise = {name: value.detach().double().requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()}
    losses = []
    for each in (inputs, precise):
        scores = each["queries"] @ each["memory_keys"].T / 2
        every, positive = scores, scores.masked_fill(each["memory_targets"] != each["targets"][:, None], -torch.inf)
        assert (every.logsumexp(1) - positive.logsumexp(1)).max() > 200
        losses.append(trime_loss(**each, chunk=4))
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=1e-3)
    for name in ("vocab_logits", "queries", "memory_keys"):
        torch.testing.assert_close(inputs[name].grad.double(), precise[name].grad, rtol=1e-3, atol=1e-2)


def test_bf16_is_near_fp64():
    inputs = example(n=64, m=64, vocabulary=50, d=32)
    narrow = {name: value.detach().bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    for chunk in (None, 16):
        loss = trime_loss(**narrow, chunk=chunk)
        assert loss.dtype == torch.float32
        assert (loss.double() - trime_loss(**inputs)).abs().max() < 0.05


def test_gradients_reach_the_keys_only_through_the_scores_that_are_named():
    inputs = example(n=12, m=12)
    queries, keys = inputs["queries"], inputs["memory_keys"]
    block = torch.arange(12) // 4
    same = block == block[:, None]

    def gradients(keys, key_gradient=None):
        found = log_sums(
            queries[None], inputs["targets"][None], keys[None], inputs["memory_targets"][None], lambda groups, rows: inputs["visible"][rows][None],
            scale=0.5, chunk=5, key_gradient=key_gradient,
        )  # fmt: skip
        return torch.autograd.grad(sum(torch.where(sums == -torch.inf, 0, sums).sum() for sums in found), [queries, inputs["memory_keys"]])

    d_queries, d_keys = gradients(keys, key_gradient=lambda groups, rows: same[rows][None])
    assert torch.equal(d_queries, gradients(keys)[0])
    scores = (queries[:, None] @ torch.where(same[..., None], keys, keys.detach()).transpose(1, 2))[:, 0] * 0.5
    seen = scores.masked_fill(~inputs["visible"], -torch.inf)
    matching = seen.masked_fill(inputs["memory_targets"] != inputs["targets"][:, None], -torch.inf)
    some = [sums[sums > -torch.inf].sum() for sums in (seen.logsumexp(1), matching[(matching > -torch.inf).any(1)].logsumexp(1))]
    torch.testing.assert_close(d_keys, torch.autograd.grad(sum(some), keys)[0])


# -- the objectives ----------------------------------------------------------------------------------------------------


SHAPE = {"hidden_size": 32, "head_dim": 16, "heads_per_layer": [2, 2], "ffn_per_layer": [64, 64], "max_position_embeddings": 64}


def decoder() -> TrimlineForCausalLM:
    torch.manual_seed(0)
    model = TrimlineForCausalLM(TrimlineConfig(vocab_size=200, kind="decoder", norm="pre", dropout=0.0, initializer_range=0.3, **SHAPE))
    return model.eval()


def groups_of(rows: int, lengths: list[int] | None = None, words: int = 6, one_document: bool = False) -> dict[str, Tensor]:
    """Rows with few different words, so that targets are in memory; each of its own document, or one document in order."""
    torch.manual_seed(1)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths or [LENGTH] * rows)[:, None]).long()
    segment = torch.arange(rows)
    document = torch.zeros(rows, LENGTH, dtype=torch.long) if one_document else segment[:, None].expand(rows, LENGTH)
    offset = torch.arange(rows * LENGTH).view(rows, LENGTH) if one_document else torch.arange(LENGTH).expand(rows, LENGTH)
    ids = torch.randint(5, 5 + words, (rows, LENGTH)) * mask
    return {
        "input_ids": ids, "attention_mask": mask, "segment": segment, "document": document.masked_fill(mask == 0, -1),
        "offset": offset.masked_fill(mask == 0, -1),
    }  # fmt: skip


def build(settings: TrimeSettings, rows: int = 1, **options: Any) -> Any:
    return objectives.build(settings, None, seed=1, group_size=rows, **options).eval()  # type: ignore[arg-type]


def token_losses(objective: Any, model: Any, batch: dict[str, Tensor], step: int = 0) -> Tensor:
    """[B, L - 1], nan where there is no target."""
    prepared = objective.prepare(batch, step)
    with torch.no_grad():
        losses = objective.token_losses(model, prepared, step)["trime"]
    labelled = prepared["labels"][:, 1:] != -100
    return torch.full(labelled.shape, torch.nan).masked_scatter(labelled, losses)


def by_hand(model: Any, batch: dict[str, Tensor], sees: Any, rows: int) -> Tensor:
    """The losses by `trime_loss` over each group, with `sees(query, key)` of (row in the group, position) pairs."""
    hidden, memory = CausalReader(model).read(input_ids=batch["input_ids"])
    logits = model.head(hidden)
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = torch.full((len(targets), LENGTH - 1), torch.nan)
    for first in range(0, len(targets), rows):
        places = [(row, at) for row in range(rows) for at in range(LENGTH - 1) if targets[first + row, at + 1] != -100]
        visible = torch.tensor([[sees(query, key) for key in places] for query in places])
        r, a = torch.tensor(places).T
        label, state = targets[first + r, a + 1], memory[first + r, a]
        with torch.no_grad():
            found[first + r, a] = trime_loss(logits[first + r, a], label, state, state, label, visible)
    return found


SETTINGS = [TrimeSettings(), TrimeLongSettings(), TrimeExtSettings()]
SEES = {
    "trimelm": lambda q, k: q[0] == k[0] and k[1] < q[1],
    "trimelm_long": lambda q, k: k < q,
    "trimelm_ext": lambda q, k: q[0] != k[0] or k[1] < q[1],
}


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.name)
def test_each_objective_sees_its_memory_and_padding_is_in_none(settings, chunk):
    model, batch = decoder(), groups_of(6, [LENGTH, 4, LENGTH, LENGTH, 1, 6])
    found = token_losses(build(settings.model_copy(update={"chunk": chunk}), 3), model, batch)
    expected = by_hand(model, batch, SEES[settings.name], 3)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    torch.testing.assert_close(token_losses(build(settings, 3), model, other), found, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=lambda settings: settings.name)
def test_no_future_token_changes_an_earlier_loss(settings):
    model, batch = decoder(), groups_of(3, one_document=True)
    before = token_losses(build(settings, 3), model, batch)
    changed = batch["input_ids"].clone()
    changed[1, 5:] = changed[1, 5:] % 6 + 5
    after = token_losses(build(settings, 3), model, {**batch, "input_ids": changed})
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1, :4], before[1, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[1, 4:], before[1, 4:])


def test_the_first_position_of_a_segment_has_exactly_the_cross_entropy_without_long_memory():
    model, batch = decoder(), groups_of(4)
    objective = build(TrimeSettings())
    losses = objective.token_losses(model, objective.prepare(batch, 0), 0)
    trime, cross_entropy = (losses[name].view(4, LENGTH - 1) for name in ("trime", "cross_entropy"))
    assert torch.equal(trime[:, 0], cross_entropy[:, 0])
    assert not torch.allclose(trime[:, 1:], cross_entropy[:, 1:])


def test_other_segments_may_stand_in_any_order():
    model, batch = decoder(), groups_of(4)
    order = torch.tensor([2, 0, 3, 1])
    found = token_losses(build(TrimeExtSettings(), 4), model, {name: value[order] for name, value in batch.items()})
    torch.testing.assert_close(found, token_losses(build(TrimeExtSettings(), 4), model, batch)[order], rtol=1e-5, atol=1e-5)


def test_another_segment_does_not_tell_what_comes_later_in_ones_own_document():
    model, batch = decoder(), groups_of(3, one_document=True)
    batch["document"][2] = 9
    sees = lambda q, k: (k < q) if 2 not in (q[0], k[0]) or q[0] == k[0] else True  # noqa: E731
    found = token_losses(build(TrimeExtSettings(), 3), model, batch)
    torch.testing.assert_close(found, by_hand(model, batch, sees, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=lambda settings: settings.name)
def test_with_a_document_mask_the_past_ends_where_the_document_began(settings):
    """Two rows of one group: document 0 fills the first and 3 tokens of the second, document 1 the rest."""
    model, batch = decoder(), groups_of(2, one_document=True)
    batch["document"][1, 3:], batch["offset"][1, 3:] = 1, torch.arange(LENGTH - 3)
    batch["document_ids"] = torch.stack([torch.zeros(LENGTH, dtype=torch.long), (torch.arange(LENGTH) >= 3).long()])
    found = token_losses(build(settings, 2), model, batch)
    assert found[1, 2].isnan(), "the first token of a document is no target"
    tail = {name: value[1:, 3:] for name, value in batch.items() if value.ndim == 2} | {"segment": torch.tensor([0])}
    torch.testing.assert_close(found[1, 3:], token_losses(build(TrimeSettings()), model, tail)[0], rtol=1e-5, atol=1e-5)


def test_the_own_past_is_dropped_by_segment_and_step_in_training_alone():
    model, batch = decoder(), groups_of(64)
    losses = {p: build(TrimeExtSettings(local_dropped=p, ce_warmup_ratio=0), 4) for p in (0.0, 0.5, 1.0)}
    with_past, without = (token_losses(losses[p].train(), model, batch) for p in (0.0, 1.0))
    half = token_losses(losses[0.5].train(), model, batch)
    kept = torch.isclose(half, with_past, atol=1e-5).all(1)
    dropped = torch.isclose(half, without, atol=1e-5).all(1)
    assert (kept ^ dropped).all()
    assert 16 < kept.sum() < 48
    reordered = torch.arange(64).roll(4)
    rolled = token_losses(losses[0.5], model, {name: value[reordered] for name, value in batch.items()})
    torch.testing.assert_close(rolled, half[reordered], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(token_losses(losses[0.5], model, batch, step=1), half)
    torch.testing.assert_close(token_losses(losses[1.0].eval(), model, batch), with_past, rtol=1e-5, atol=1e-5)


def test_the_first_steps_learn_by_cross_entropy(tokenizer):
    model, batch = decoder(), groups_of(4)
    objective = objectives.build(TrimeSettings(ce_warmup_ratio=0.1), tokenizer, seed=1, steps=50).train()
    assert objective.ce_warmup_steps == 5
    causal = model(batch["input_ids"], labels=batch["input_ids"]).loss
    found = [objective(model, objective.prepare(batch, step), step) for step in (4, 5)]
    torch.testing.assert_close(found[0]["trime"], causal)
    assert found[0]["memory_share"] == 0
    assert not torch.isclose(found[1]["trime"], causal)
    torch.testing.assert_close(found[1]["cross_entropy"], causal)
    assert 0 < found[1]["memory_share"] < 1
    assert not found[1]["cross_entropy"].requires_grad


def test_a_batch_without_targets_has_losses_of_zero():
    model, batch = decoder(), groups_of(4, [1, 1, 1, 1])
    objective = build(TrimeLongSettings(), 2).train()
    losses = objective(model, objective.prepare(batch, 0), 0)
    assert all(loss == 0 for loss in losses.values())
    losses["trime"].backward()


def test_only_queries_of_its_own_segment_teach_a_key_where_gradients_are_stopped():
    model, batch = decoder(), groups_of(2)

    def gradient(settings, rows):
        objective = build(settings, 2)
        _, memory = CausalReader(model).read(input_ids=batch["input_ids"])
        memory = memory.detach().requires_grad_()
        every, _ = objective._log_sums(memory[:, :-1], batch["input_ids"][:, 1:], objective.prepare(batch, 0))
        return torch.autograd.grad(every.view(2, LENGTH - 1)[rows, 1:].sum(), memory)[0]

    assert gradient(TrimeLongSettings(), 1)[0].abs().sum() > 0
    stopped = gradient(TrimeLongSettings(key_gradients="own_segment"), 1)
    assert stopped[0].abs().sum() == 0
    assert stopped[1].abs().sum() > 0


def models() -> dict[str, Any]:
    shape = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return {
        "ours": decoder(),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)),
        "llama": LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=1)),
    }


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama", "qwen2"])
def test_any_causal_model_learns_to_copy_from_its_own_past(name, tokenizer):
    """Rows repeat five random words: the vocabulary cannot know them, the memory can."""
    model = models()[name]
    objective = objectives.build(TrimeSettings(ce_warmup_ratio=0), tokenizer, seed=1)
    trainee = Trainee(model, objective).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draws = torch.Generator().manual_seed(0)
    for step in range(60):
        words = torch.randint(5, 200, (8, 5), generator=draws)
        batch = {"input_ids": words.repeat(1, 4), "attention_mask": torch.ones(8, 20, dtype=torch.long), "segment": torch.arange(8)}
        batch |= {"document": batch["attention_mask"], "offset": batch["attention_mask"]}
        losses = trainee(trainee.prepare(batch, step), step)
        losses["trime"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["trime"] < losses["cross_entropy"] - 1


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama"])
def test_recomputed_activations_give_the_same_gradients(name):
    batch = groups_of(4)

    def gradients(recompute: bool) -> list[Tensor]:
        model = models()[name].train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if recompute:
            model.gradient_checkpointing_enable()
        objective = build(TrimeLongSettings(ce_warmup_ratio=0), 2)
        objective(model, objective.prepare(batch, 0), 0)["trime"].backward()
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other)
