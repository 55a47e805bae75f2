from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.models.modeling_trimline import (
    TrimlineForCausalLM,
    TrimlineForMaskedLM,
    TrimlineForSequenceClassification,
    TrimlineModel,
    mean_cross_entropy,
)


def randomise_vectors(model: nn.Module) -> None:
    """Biases and LayerNorms start at 0 and 1, where mistakes with them do not show."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_later_token_does_not_change_the_past_of_a_decoder(make_config, norm):
    model = TrimlineForCausalLM(make_config(kind="decoder", norm=norm)).eval()
    ids = torch.randint(5, 40, (2, 10))
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1 - 5) % 35 + 5
    for mask in (None, torch.ones_like(ids)):
        before, after = model(ids, mask).logits, model(changed, mask).logits
        assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
        assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_padding_does_not_leak_into_tokens(make_config, rows, kind):
    model = TrimlineModel(make_config(kind=kind, norm="pre" if kind == "decoder" else "post")).eval()
    ids, mask = rows
    padded = model(ids, mask).last_hidden_state
    other_padding = model(torch.where(mask.bool(), ids, 7), mask).last_hidden_state
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = model(ids[row : row + 1, :length]).last_hidden_state[0]
        assert torch.allclose(padded[row, :length], alone, atol=1e-5)
        assert torch.allclose(padded[row, :length], other_padding[row, :length], atol=1e-5)


def test_a_row_of_padding_alone_stays_finite(make_config):
    model = TrimlineForMaskedLM(make_config()).eval()
    ids = torch.zeros(2, 6, dtype=torch.long)
    assert model(ids, torch.tensor([[0] * 6, [1] * 6])).logits.isfinite().all()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_masks_of_ones_change_nothing(make_config, rows, norm):
    model = TrimlineForMaskedLM(make_config(norm=norm)).eval()
    masks = {"heads": torch.ones(2, 4), "neurons": torch.ones(2, 48)}
    assert torch.equal(model(*rows, masks=masks).logits, model(*rows).logits)


def test_a_head_mask_of_zero_removes_what_the_head_writes(make_config, rows):
    model = TrimlineForMaskedLM(make_config()).eval()
    randomise_vectors(model)
    masks = {"heads": torch.ones(2, 4)}
    masks["heads"][1, 2] = 0
    without = copy.deepcopy(model)
    without.model.layers[1].attention.output.weight.data[:, 16:24] = 0
    masked = model(*rows, masks=masks).logits
    assert torch.allclose(masked, without(*rows).logits, atol=1e-5)
    assert not torch.allclose(masked, model(*rows).logits, atol=1e-2)


def test_a_neuron_mask_scales_the_gelu_output(make_config, rows):
    model = TrimlineForMaskedLM(make_config()).eval()
    masks = {"neurons": torch.rand(2, 48)}
    scaled = copy.deepcopy(model)
    for layer, block in enumerate(scaled.model.layers):
        block.feed_forward.down.weight.data *= masks["neurons"][layer]
    assert torch.allclose(model(*rows, masks=masks).logits, scaled(*rows).logits, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_masking_a_whole_sublayer_equals_its_absence(make_config, rows, norm):
    model = TrimlineForMaskedLM(make_config(norm=norm)).eval()
    randomise_vectors(model)
    removed = TrimlineForMaskedLM(make_config(norm=norm, heads_per_layer=[4, 0], ffn_per_layer=[0, 48])).eval()
    removed.load_state_dict(model.state_dict(), strict=False)
    masks = {"heads": torch.ones(2, 4), "neurons": torch.ones(2, 48)}
    masks["heads"][1], masks["neurons"][0] = 0, 0
    assert torch.allclose(model(*rows, masks=masks).logits, removed(*rows).logits, atol=1e-5)


def test_layers_may_differ_in_width_and_masks_reach_each_by_its_own(make_config, rows):
    model = TrimlineForMaskedLM(make_config(heads_per_layer=[3, 1, 0], ffn_per_layer=[10, 0, 5])).eval()
    masks = {"heads": torch.rand(3, 4), "neurons": torch.rand(3, 48)}
    logits = model(*rows, masks=masks).logits
    beyond = {"heads": masks["heads"].clone(), "neurons": masks["neurons"].clone()}
    beyond["heads"][1, 1:] = 9
    beyond["neurons"][0, 10:] = 9
    assert torch.equal(logits, model(*rows, masks=beyond).logits)
    beyond["heads"][1, 0] = 9
    assert not torch.allclose(logits, model(*rows, masks=beyond).logits)


def test_an_unknown_mask_is_refused(make_config, rows):
    with pytest.raises(ValueError, match=r"head.*known are attention, feedforward, heads, hidden, neurons"):
        TrimlineModel(make_config())(*rows, masks={"head": torch.ones(2, 4)})


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_memory_states_are_the_input_of_the_last_feed_forward_block(make_config, rows, norm):
    for ffn, last in (([48, 48], 1), ([48, 0], 0)):
        model = TrimlineForMaskedLM(make_config(norm=norm, ffn_per_layer=ffn)).eval()
        seen = []
        model.model.layers[last].feed_forward.up.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        assert torch.equal(model(*rows).memory_states, seen[0])
    model = TrimlineModel(make_config(norm=norm, ffn_per_layer=[0, 0])).eval()
    output = model(*rows)
    assert torch.equal(output.memory_states, output.last_hidden_state)


def test_hidden_states_are_the_embeddings_and_every_layer(make_config, rows):
    output = TrimlineModel(make_config()).eval()(*rows, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(make_config, rows, reentrant):
    plain = TrimlineForMaskedLM(make_config(dropout=0.2)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    checkpointed.model.layers[0].attention.query.register_forward_hook(lambda *_: calls.append(1))
    masks = {"heads": torch.rand(2, 4), "neurons": torch.rand(2, 48)}
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        model(*rows, labels=rows[0], masks=masks).loss.backward()
    assert len(calls) == 2, "the layer was not computed a second time"
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6), name


def test_the_masked_loss_is_over_labelled_positions_alone(make_config, rows):
    model = TrimlineForMaskedLM(make_config()).eval()
    labels = torch.full_like(rows[0], -100)
    labels[0, 3], labels[2, 1] = 9, 11
    output = model(*rows, labels=labels)
    full = model(*rows).logits
    expected = -(full[0, 3].log_softmax(-1)[9] + full[2, 1].log_softmax(-1)[11]) / 2
    assert torch.allclose(output.loss, expected, atol=1e-5)
    assert torch.allclose(output.logits, torch.stack([full[0, 3], full[2, 1]]), atol=1e-5)


def test_a_batch_without_targets_has_loss_zero_and_zero_gradients(make_config, rows):
    model = TrimlineForMaskedLM(make_config())
    loss = model(*rows, labels=torch.full_like(rows[0], -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_causal_loss_predicts_the_next_token(make_config):
    model = TrimlineForCausalLM(make_config(kind="decoder")).eval()
    ids = torch.randint(5, 40, (2, 6))
    labels = ids.clone()
    labels[1, 4:] = -100
    logits = model(ids).logits
    pairs = [(row, at) for row, length in ((0, 6), (1, 4)) for at in range(length - 1)]
    expected = -torch.stack([logits[row, at].log_softmax(-1)[ids[row, at + 1]] for row, at in pairs]).mean()
    assert torch.allclose(model(ids, labels=labels).loss, expected, atol=1e-5)


def test_a_decoder_generates_and_left_padding_does_not_change_what(make_config):
    model = TrimlineForCausalLM(make_config(kind="decoder", norm="pre")).eval()
    prompt = torch.randint(5, 40, (1, 4))
    padded, mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), prompt], 1), torch.tensor([[0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = model.generate(prompt, **options)
    assert alone[0, 4] == model(prompt).logits[0, -1].index_fill(0, torch.tensor([3]), -torch.inf).argmax()
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 2:], alone)


def test_output_matrix_and_embedding_are_one_parameter(make_config):
    assert (masked := TrimlineForMaskedLM(make_config())).head.decoder.weight is masked.model.embeddings.word.weight
    assert (causal := TrimlineForCausalLM(make_config(kind="decoder"))).head.weight is causal.model.embeddings.word.weight


def test_more_tokens_than_positions_are_refused_with_both_numbers(make_config):
    with pytest.raises(ValueError, match=r"17 tokens.* positions for 16"):
        TrimlineModel(make_config())(torch.ones(1, 17, dtype=torch.long))


def test_bf16_with_fp32_masks_runs_and_agrees_with_fp32(make_config, rows):
    model = TrimlineForMaskedLM(make_config(initializer_range=0.05)).eval()
    masks = {"heads": torch.rand(2, 4), "neurons": torch.rand(2, 48)}
    exact = model(*rows, masks=masks).logits
    rounded = copy.deepcopy(model).bfloat16()(*rows, masks=masks).logits
    assert rounded.dtype == torch.bfloat16
    assert (exact - rounded.float()).abs().max() < 0.1 * exact.abs().max()


def test_classification_takes_labels_as_classes_or_as_numbers(make_config, rows):
    classes = TrimlineForSequenceClassification(make_config(num_labels=3)).eval()
    labels = torch.tensor([0, 2, 1])
    output = classes(*rows, labels=labels)
    assert torch.allclose(output.loss, mean_cross_entropy(output.logits, labels))
    number = TrimlineForSequenceClassification(make_config(num_labels=1)).eval()
    output = number(*rows, labels=torch.tensor([0.5, 1.5, -2.0]))
    assert torch.allclose(output.loss, ((output.logits[:, 0] - torch.tensor([0.5, 1.5, -2.0])) ** 2).mean())


def packed(*lengths: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and document numbers [2, L]: rows of documents of these lengths, no token twice in a row, padded to `length`."""
    total = sum(lengths)
    ids = torch.stack([5 + torch.randperm(35)[:total] for _ in range(2)])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    padding = (0, (length or total) - total)
    return nn.functional.pad(ids, padding), nn.functional.pad(documents, padding, value=-1)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_document_in_a_packed_row_comes_out_as_alone_in_a_row(make_config, kind):
    model = TrimlineModel(make_config(kind=kind, norm="pre" if kind == "decoder" else "post")).eval()
    ids, documents = packed(6, 1, 9)
    output = model(ids, document_ids=documents).last_hidden_state
    for first, last in ((0, 6), (6, 7), (7, 16)):
        alone = model(ids[:, first:last]).last_hidden_state
        assert torch.allclose(output[:, first:last], alone, atol=1e-5)
    assert not torch.allclose(output, model(ids).last_hidden_state, atol=1e-2)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_gradients_do_not_cross_documents(make_config, kind):
    model = TrimlineModel(make_config(kind=kind))
    ids, documents = packed(5, 4, 6)
    model(ids, document_ids=documents).last_hidden_state[:1, 5:9].square().sum().backward()
    reached = model.embeddings.word.weight.grad.abs().sum(dim=1) > 0
    assert reached[ids[0, 5:9]].all()
    assert reached.sum() == 4


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_padding_after_packed_documents_leaks_nowhere_and_stays_finite(make_config, kind):
    model = TrimlineModel(make_config(kind=kind)).eval()
    ids, documents = packed(4, 5, length=12)
    mask = (documents >= 0).long()
    output = model(ids, document_ids=documents).last_hidden_state
    assert output.isfinite().all()
    assert torch.equal(output, model(ids, mask, document_ids=documents).last_hidden_state)
    assert torch.allclose(output[:, :9], model(ids[:, :9], document_ids=documents[:, :9]).last_hidden_state, atol=1e-5)
    numbered = documents.masked_fill(documents < 0, 1)  # padding counted to the last document, told by the attention mask alone
    assert torch.allclose(output[:, :9], model(ids, mask, document_ids=numbered).last_hidden_state[:, :9], atol=1e-5)
