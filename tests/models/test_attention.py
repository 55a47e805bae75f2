"""The ways that attention goes give one result, with padding or without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.models import attention
from pipeline.models.attention import Packing, attend
from pipeline.models.modeling_trimline import TrimlineForMaskedLM, TrimlineModel
from pipeline.models.positions import SCHEMES

DECODERS = ("absolute", "sinusoidal", "rope", "alibi")
KINDS = [*((scheme, "encoder") for scheme in SCHEMES), *((scheme, "decoder") for scheme in DECODERS)]


@pytest.mark.parametrize("bias_rows", [1, 3])
@pytest.mark.parametrize("cells", [1, 100, 2**18])
def test_a_learned_bias_has_the_kernels_result_and_gradients(monkeypatch, bias_rows, cells):
    """However many heads are held at a time; hidden keys get none."""
    monkeypatch.setattr(attention._LearnedBias, "CELLS", cells)
    shapes = [(3, 4, 7, 8)] * 3 + [(bias_rows, 4, 7, 7)]
    ours, kernels = ([torch.randn(shape, generator=torch.Generator().manual_seed(at)) for at, shape in enumerate(shapes)] for _ in range(2))
    for tensor in (*ours, *kernels):
        tensor.requires_grad_()
    hidden = torch.arange(7) >= torch.tensor([[7], [5], [6]])[:, None, None]
    out, expected = (
        way(*inputs[:3], inputs[3].masked_fill(hidden, torch.finfo(torch.float32).min), *rest, scale=0.3)
        for way, inputs, rest in ((attend, ours, (ours[3], 0.0, False)), (scaled_dot_product_attention, kernels, ()))
    )
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, kernels, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
    if bias_rows == 3:
        assert not ours[3].grad[hidden.expand(3, 4, 7, 7)].any()


def test_attention_drops_out_probabilities_beside_a_learned_bias():
    """And its gradients are those of the formula with the same probabilities dropped."""
    query, key = (torch.randn(2, 4, 50, 50, requires_grad=True) for _ in range(2))
    bias, value = torch.randn(1, 4, 50, 50, requires_grad=True), torch.eye(50).expand(2, 4, -1, -1).clone().requires_grad_()
    dropped = attend(query, key, value, bias, bias, 0.3, False, 0.1)  # of these values, the probabilities themselves
    weights = (0.1 * query @ key.transpose(2, 3) + bias).softmax(dim=-1)
    kept = dropped.detach() > 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    expected = weights * kept / 0.7 @ value
    torch.testing.assert_close(dropped, expected)
    inputs, direction = (query, key, bias, value), torch.randn_like(expected)
    ours, formula = (torch.autograd.grad((out * direction).sum(), inputs) for out in (dropped, expected))
    torch.testing.assert_close(ours, formula, atol=1e-5, rtol=1e-4)


def test_packing_takes_real_tokens_and_puts_them_back():
    real = torch.tensor([[True, True, False], [False, True, True]])
    packing = Packing.of(real)
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(packing.pack(x), x[real])
    assert torch.equal(packing.unpack(packing.pack(x)), x * real[..., None])
    assert Packing.of(torch.ones(2, 3, dtype=torch.bool)) is None


def twins(make_config, model_class, **changes):
    torch.manual_seed(0)
    padded = model_class(make_config(**changes))
    unpadded = copy.deepcopy(padded)
    unpadded.config.unpadded = True
    return padded, unpadded


def inputs_of(name, rows):
    ids, mask = rows
    if name == "padding":
        return {"input_ids": ids, "attention_mask": mask}
    if name == "left padding":
        return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 2 + [2] * 4 + [-1] * 3, [0] * 5 + [-1] * 7])
    return {"input_ids": ids, "document_ids": documents, **({"attention_mask": mask} if name == "documents and padding" else {})}


@pytest.mark.parametrize("name", ["padding", "left padding", "documents", "documents and padding"])
@pytest.mark.parametrize(("scheme", "kind"), KINDS)
def test_without_padding_every_output_at_real_tokens_is_the_same(make_config, rows, scheme, kind, name):
    norm = "pre" if kind == "decoder" else "post"
    padded, unpadded = (model.eval() for model in twins(make_config, TrimlineModel, positions=scheme, kind=kind, norm=norm))
    inputs = inputs_of(name, rows)
    real = (inputs["attention_mask"] > 0) if "attention_mask" in inputs else inputs["document_ids"] >= 0
    masks = {"heads": torch.rand(2, 4), "neurons": torch.rand(2, 48)}
    seen = []
    unpadded.layers[1].feed_forward.up.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    ours, theirs = (model(**inputs, masks=masks, output_hidden_states=True) for model in (unpadded, padded))
    assert seen == [(26, 32)], "26 of the 36 tokens are real"
    pairs = [(ours.last_hidden_state, theirs.last_hidden_state), (ours.memory_states, theirs.memory_states)]
    for one, other in [*pairs, *zip(ours.hidden_states, theirs.hidden_states, strict=True)]:
        torch.testing.assert_close(one[real], other[real], atol=1e-5, rtol=1e-5)
        assert not one[~real].any()


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("scheme", ["absolute", "tupe-relative", "rope"])
def test_without_padding_gradients_are_the_same_also_with_checkpoints(make_config, rows, scheme, checkpointing):
    padded, unpadded = twins(make_config, TrimlineForMaskedLM, positions=scheme, dropout=0.0)
    if checkpointing is not None:
        unpadded.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    labels = rows[0].masked_fill(rows[1] == 0, -100)
    for model in (padded, unpadded):
        model.train()(*rows, labels=labels).loss.backward()
    for (name, one), other in zip(padded.named_parameters(), unpadded.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other[1].grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_batch_of_full_rows_is_left_as_it_is(make_config, rows):
    padded, unpadded = (model.eval() for model in twins(make_config, TrimlineModel))
    full = rows[0] % 35 + 5
    for mask in (None, torch.ones_like(full)):
        assert torch.equal(unpadded(full, mask).last_hidden_state, padded(full, mask).last_hidden_state)


def test_rows_of_padding_alone_give_zeros(make_config, rows):
    _, unpadded = twins(make_config, TrimlineModel)
    assert not unpadded(rows[0], torch.zeros_like(rows[1])).last_hidden_state.any()
