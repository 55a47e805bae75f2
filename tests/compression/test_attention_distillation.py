import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from pipeline.compression.attention_distillation import Origin, attention_loss, origins, pairs
from pipeline.compression.distillation import Distillation
from pipeline.compression.general import GeneralDistillation
from pipeline.compression.settings import DistillationSettings
from pipeline.compression.sparsity import Prunable
from pipeline.compression.student import student
from pipeline.compression.surgery import remove
from pipeline.models import build
from pipeline.models.modeling_trimline import TrimlineForMaskedLM
from pipeline.models.positions import SCHEMES
from pipeline.objectives.settings import DistillSettings, StudentSettings


@pytest.fixture
def inputs():
    """Rows of 9 and 6 tokens."""
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()}


def test_the_scores_are_those_of_stock_bert(tmp_path, inputs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    stock = BertModel(BertConfig(**sizes, initializer_range=0.5), add_pooling_layer=False).eval()
    stock.set_attn_implementation("eager")
    stock.save_pretrained(tmp_path)
    ours = build.load(tmp_path, head="none").eval()
    with torch.no_grad():
        expected, found = stock(**inputs, output_attentions=True).attentions, ours(**inputs, output_attention_scores=True).attention_scores
    hidden = inputs["attention_mask"][:, None, None] == 0
    for weights, scores in zip(expected, found, strict=True):
        torch.testing.assert_close(scores.masked_fill(hidden, -torch.inf).softmax(-1), weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("positions", SCHEMES)
def test_the_scores_are_those_that_make_the_context(encoder, inputs, positions, unpadded):
    """Of a model that lost heads too."""
    model = encoder(positions=positions)
    model = remove(model, {"heads": torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])})
    model.config.unpadded = unpadded
    attention, seen = model.base_model.layers[2].attention, {}
    attention.value.register_forward_hook(lambda module, given, made: seen.update(value=made))
    attention.register_forward_hook(lambda module, given, made: seen.update(packing=given[4], made=made[0]))
    with torch.no_grad():
        scores = model(**inputs, output_attention_scores=True).attention_scores
        assert [None if found is None else found.shape[1] for found in scores] == [3, None, 2]
        value, made = (side if seen["packing"] is None else seen["packing"].unpack(side) for side in (seen["value"], seen["made"]))
        real = inputs["attention_mask"].bool()
        weights = scores[2].masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
        context = (weights @ value.unflatten(-1, (2, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.output(context)[real], made[real], atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_a_loop_over_heads_and_pairs(inputs):
    generator = torch.Generator().manual_seed(1)
    teacher = [torch.randn(2, 4, 9, 9, generator=generator) for _ in range(3)]
    made = [torch.randn(2, heads, 9, 9, generator=generator) for heads in (1, 2)]
    learnt = [Origin(0, [3]), Origin(2, [0, 2])]
    expected = 0.0
    for scores, (layer, heads) in zip(made, learnt, strict=True):
        for head, origin in enumerate(heads):
            places = [(row, i, j) for row, length in enumerate((9, 6)) for i in range(length) for j in range(length)]
            squares = sum((scores[row, head, i, j] - teacher[layer][row, origin, i, j]) ** 2 for row, i, j in places)
            expected += squares / len(places) / len(heads)
    found = attention_loss([made[0], None, made[1]], teacher, learnt, pairs(inputs))
    torch.testing.assert_close(found, expected)
    assert attention_loss([made[0], None, made[1]], teacher, learnt, torch.zeros(2, 9, 9, dtype=torch.bool)).item() == 0


def test_tokens_of_two_documents_do_not_see_each_other(inputs):
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, -1, -1, -1]])
    seen = pairs({**inputs, "document_ids": documents})
    expected = [[i, j] for i in range(6) for j in range(6) if documents[1, i] == documents[1, j]]
    assert seen[1].nonzero().tolist() == expected
    assert seen[0].sum() == 3 * 3 + 2 * 2 + 4 * 4


def test_heads_come_from_where_the_masks_left_them(encoder):
    masks = {"heads": torch.tensor([[0, 0.7, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]), "attention": torch.tensor([0.9, 0, 1])}
    prunable = Prunable.of(encoder().config)
    assert origins(masks, prunable) == [Origin(0, [1, 3])]
    assert origins({}, prunable) == [Origin(layer, [0, 1, 2, 3]) for layer in range(3)]


def test_what_is_left_of_the_teacher_begins_with_its_scores_in_the_first_layer(encoder, inputs):
    """And with those of all layers, where nothing is gone."""
    teacher = encoder()
    settings = DistillationSettings(layers=0, attention=2.0)
    for masks, least in (({}, 0.0), ({"heads": torch.tensor([[0, 1.0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]])}, 1e-3)):
        smaller = remove(teacher, masks)
        heads = origins(masks, Prunable.of(teacher.config))
        objective = Distillation(teacher, settings, heads=heads)
        data = inputs | {"labels": torch.tensor([0, 1])}
        assert objective.loss_weights == {"distill": 0.5, "attention": 2.0}
        assert objective.targets(data)["attention"] == 9 * 9 + 6 * 6
        loss = objective(smaller, data, 0)["attention"]
        ours, theirs = (model(**inputs, output_attention_scores=True).attention_scores for model in (smaller, teacher))
        torch.testing.assert_close(ours[0], theirs[0][:, heads[0].heads])
        assert loss.item() == 0 if not least else loss.item() > least
    assert Distillation(teacher, settings).loss_weights == {"distill": 0.5}


def test_a_student_learns_attention_and_recomputed_activations_change_nothing(encoder, inputs, tokenizer):
    teacher = encoder(kind=TrimlineForMaskedLM)
    smaller = student(teacher, StudentSettings(layers=2, heads=2, ffn=16))
    objective = GeneralDistillation(DistillSettings(prediction=0, layers=0, attention=1.0), tokenizer, 1, teacher)
    data = objective.prepare(inputs | {"segment": torch.tensor([0, 1])}, 0)
    again = copy.deepcopy(smaller)
    again.gradient_checkpointing_enable()
    gradients = []
    for model in (smaller.train(), again.train()):
        objective(model, data, 0)["attention"].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert any("layers.1.attention.query" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    optimizer, losses = torch.optim.Adam(smaller.parameters(), lr=1e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(smaller, data, 0)["attention"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
