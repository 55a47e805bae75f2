import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification

from pipeline.compression.sparsity import Prunable
from pipeline.compression.surgery import compact, forget_width, remove
from pipeline.errors import UserError
from pipeline.models import attention, export
from pipeline.models.modeling_trimline import (
    TrimlineForCausalLM,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlineForSequenceClassification,
)
from pipeline.models.positions import SCHEMES
from pipeline.models.size import block_parameters, parameters


def batch(rows=5, length=12):
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(rows, length, dtype=torch.long)
    attention_mask[1, 7:] = 0
    return {"input_ids": torch.randint(1, 50, (rows, length), generator=generator), "attention_mask": attention_mask}


def soft_masks(zero_heads=(), zero_neurons=()):
    """Half of the units at 0, the others between 0 and 1; whole layers at 0 as asked."""
    generator = torch.Generator().manual_seed(2)
    masks = {"heads": torch.rand(3, 4, generator=generator), "neurons": torch.rand(3, 48, generator=generator)}
    masks = {unit: torch.where(mask < 0.5, 0, mask) for unit, mask in masks.items()}
    masks["heads"][:, 0], masks["neurons"][:, 0] = 0.7, 0.9
    masks["heads"][list(zero_heads)] = 0
    masks["neurons"][list(zero_neurons)] = 0
    return masks


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("zero_heads", "zero_neurons"), [((), ()), ((1,), ()), ((), (2,)), ((0, 2), (0,)), ((1,), (1,)), ((0, 1, 2), (0, 1, 2))])
def test_the_removed_model_gives_the_masked_models_logits(encoder, norm, zero_heads, zero_neurons):
    model, masks, inputs = encoder(norm), soft_masks(zero_heads, zero_neurons), batch()
    with torch.no_grad():
        whole, masked, removed = model(**inputs).logits, model(**inputs, masks=masks).logits, remove(model, masks)(**inputs).logits
    assert (masked - removed).abs().max() < 1e-5
    assert (masked - whole).abs().max() > 1e-2


def test_the_dense_model_is_left_as_it_was(encoder):
    model, inputs = encoder(), batch()
    before, size = model(**inputs).logits, parameters(model)
    remove(model, soft_masks(zero_heads=[1]))
    assert torch.equal(model(**inputs).logits, before)
    assert parameters(model) == size
    assert model.config.heads_per_layer == [4, 4, 4]


def test_the_weights_are_gone_and_the_config_says_so(encoder):
    model, masks = encoder(), soft_masks(zero_heads=[1], zero_neurons=[0])
    removed = remove(model, masks)
    kept_heads, kept_neurons = (masks["heads"] > 0).sum(1).tolist(), (masks["neurons"] > 0).sum(1).tolist()
    assert (removed.config.heads_per_layer, removed.config.ffn_per_layer) == (kept_heads, kept_neurons)
    assert parameters(removed) < parameters(model)
    alive = sum(p.numel() for name, p in removed.named_parameters() if "attention." in name or "feed_forward." in name)
    assert alive == block_parameters(removed.config)


def test_a_removed_model_is_built_again_from_its_config_and_can_be_pruned_further(encoder):
    model, inputs = encoder(), batch()
    removed = remove(model, soft_masks(zero_heads=[1]))
    again = TrimlineForSequenceClassification(removed.config).eval()
    again.load_state_dict(removed.state_dict())
    assert torch.equal(again(**inputs).logits, removed(**inputs).logits)
    masks = {"heads": torch.ones(3, 4)}
    masks["heads"][0, 0] = 0
    assert (remove(again, masks)(**inputs).logits - again(**inputs, masks=masks).logits).abs().max() < 1e-5


def uniform_masks(dimensions, heads, neurons):
    """The middle layer goes; of the others so many units stay, the last."""
    masks = {"heads": torch.zeros(3, 4), "neurons": torch.zeros(3, 48), "hidden": torch.zeros(32)}
    masks["heads"][[0, 2], -heads:], masks["neurons"][[0, 2], -neurons:], masks["hidden"][-dimensions:] = 1, 1, 1
    return masks


def test_layers_of_which_nothing_is_left_can_go_altogether(encoder):
    masks = soft_masks(zero_heads=(0, 1), zero_neurons=(1,))
    removed = remove(encoder(), masks)
    smaller, inputs = compact(removed), batch()
    assert torch.equal(smaller(**inputs).logits, removed(**inputs).logits)
    assert (smaller.config.num_hidden_layers, smaller.config.heads_per_layer[0], len(smaller.config.heads_kept)) == (2, 0, 2)
    again = TrimlineForSequenceClassification(smaller.config).eval()
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(again(**inputs).logits, removed(**inputs).logits)
    assert removed.config.num_hidden_layers == 3


@pytest.mark.parametrize(("kind", "stock"), [(TrimlineForMaskedLM, BertForMaskedLM), (TrimlineForQuestionAnswering, BertForQuestionAnswering)])
@pytest.mark.parametrize(("dimensions", "heads"), [(32, 4), (24, 3)])
def test_a_uniform_shape_becomes_stock_bert_with_the_same_outputs(encoder, tmp_path, kind, stock, dimensions, heads):
    model, inputs = encoder(kind=kind, labels=2), batch()
    masks = uniform_masks(dimensions, heads, 20)
    export.save(forget_width(compact(remove(model, masks))), None, tmp_path)
    loaded = stock.from_pretrained(tmp_path)
    assert (loaded.config.num_hidden_layers, loaded.config.hidden_size, loaded.config.num_attention_heads) == (2, dimensions, heads)
    with torch.no_grad():
        masked, found = model(**inputs, masks=masks), loaded(**inputs)
    for name in ("logits",) if kind is TrimlineForMaskedLM else ("start_logits", "end_logits"):
        assert (masked[name] - found[name])[inputs["attention_mask"] == 1].abs().max() < 1e-4


def test_a_classifier_of_a_uniform_shape_becomes_stock_bert_and_loses_the_pooler_outputs_of_least_weight(encoder, tmp_path):
    model, inputs = encoder(), batch()
    with torch.no_grad():
        model.classifier.weight[:, 3:11] = 0  # what is lost matters nothing
    masks = uniform_masks(24, 3, 20)
    export.save(forget_width(compact(remove(model, masks))), None, tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.classifier.in_features == loaded.bert.pooler.dense.out_features == 24
    with torch.no_grad():
        assert (model(**inputs, masks=masks).logits - loaded(**inputs).logits).abs().max() < 1e-4


def test_one_unit_alone_can_be_masked(encoder):
    model, inputs = encoder(), batch()
    masks = {"neurons": soft_masks()["neurons"]}
    removed = remove(model, masks)
    assert removed.config.heads_per_layer == [4, 4, 4]
    assert (removed(**inputs).logits - model(**inputs, masks=masks).logits).abs().max() < 1e-5


@pytest.mark.parametrize("positions", SCHEMES)
def test_heads_keep_their_own_positions(encoder, positions):
    """The first of a layer's heads go, so that those left would take the positions of others if these were counted from 0."""
    model, inputs = encoder(positions=positions), batch()
    masks = {"heads": torch.ones(3, 4)}
    masks["heads"][0, :2], masks["heads"][1, 1] = 0, 0
    masked, removed = model(**inputs, masks=masks).logits, remove(model, masks)
    assert removed.config.heads_kept == [[2, 3], [0, 2, 3], None]
    torch.testing.assert_close(removed(**inputs).logits, masked, atol=1e-5, rtol=1e-5)
    again = TrimlineForSequenceClassification(removed.config).eval()
    again.load_state_dict(removed.state_dict())
    masks = {"heads": torch.ones(3, 4)}
    masks["heads"][:2, 1] = 0
    twice = remove(again, masks)
    assert twice.config.heads_kept == [[2], [0, 3], None]
    torch.testing.assert_close(twice(**inputs).logits, again(**inputs, masks=masks).logits, atol=1e-5, rtol=1e-5)


def test_positions_are_not_what_is_pruned(encoder):
    plain, untied = encoder(), encoder(positions="tupe-relative")
    assert Prunable.of(plain.config) == Prunable.of(untied.config)
    assert block_parameters(plain.config) == block_parameters(untied.config)


def masks_of_every_unit(model, seed, units):
    """A third of everything at 0, layers among it, the rest between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = Prunable.of(model.config).shapes
    drawn = {unit: torch.rand(shapes[unit], generator=generator) for unit in shapes}
    return {unit: torch.where(drawn[unit] < 0.35, 0.0, drawn[unit]) for unit in units}


ENCODERS = (TrimlineForSequenceClassification, TrimlineForMaskedLM, TrimlineForQuestionAnswering)
UNITS = ("heads", "neurons", "attention", "feedforward", "hidden")
WITH_DIMENSIONS = [scheme for scheme in SCHEMES if scheme != "sinusoidal"]
MODELS = [(kind, norm, scheme) for kind in ENCODERS for norm in ("post", "pre") for scheme in WITH_DIMENSIONS]
MODELS += [(TrimlineForCausalLM, "pre", scheme) for scheme in WITH_DIMENSIONS if "decoder" in SCHEMES[scheme].kinds]


@pytest.mark.parametrize(("kind", "norm", "positions"), MODELS, ids=lambda value: getattr(value, "__name__", value))
def test_masks_of_every_unit_are_folded_exactly(encoder, kind, norm, positions):
    for seed in range(4):
        model, inputs = encoder(norm, positions=positions, kind=kind, seed=seed), batch()
        masks = masks_of_every_unit(model, seed, UNITS)
        removed = remove(model, masks)
        again = kind(removed.config).eval()
        again.load_state_dict(removed.state_dict())
        with torch.no_grad():
            found, expected, whole = (
                output["start_logits"] if "start_logits" in output else output["logits"]
                for output in (again(**inputs), model(**inputs, masks=masks), model(**inputs))
            )
        assert removed.config.hidden_size == int((masks["hidden"] != 0).sum()) < 32
        real = slice(None) if found.shape[:2] != inputs["attention_mask"].shape else inputs["attention_mask"] == 1
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
        assert (whole - expected).abs().max() > 1e-2


@pytest.mark.parametrize("units", [("attention",), ("feedforward",), ("hidden",), ("attention", "heads"), ("feedforward", "hidden")])
def test_any_units_alone_are_folded_exactly(encoder, units):
    model, inputs = encoder(), batch()
    masks = masks_of_every_unit(model, 3, units)
    torch.testing.assert_close(remove(model, masks)(**inputs).logits, model(**inputs, masks=masks).logits, atol=1e-5, rtol=1e-5)


def test_a_layer_whose_heads_are_all_dead_is_dead_though_its_own_mask_is_not(encoder):
    """The official code adds the output bias and a LayerNorm there, which the removed model does not have."""
    model, inputs = encoder(), batch()
    masks = {"heads": torch.ones(3, 4), "attention": torch.full((3,), 0.9), "hidden": torch.ones(32)}
    masks["heads"][1] = 0
    removed = remove(model, masks)
    assert removed.config.heads_per_layer == [4, 0, 4]
    torch.testing.assert_close(removed(**inputs).logits, model(**inputs, masks=masks).logits, atol=1e-5, rtol=1e-5)


def test_dimensions_of_a_sinusoidal_model_stay(encoder):
    with pytest.raises(UserError, match="sinusoidal positions are a function of the width; leave `hidden` out"):
        remove(encoder(positions="sinusoidal"), {"hidden": torch.ones(32)})


@pytest.mark.parametrize(("kind", "norm", "positions"), MODELS[:: len(MODELS) // 12], ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("unpadded", [False, True])
def test_closed_units_are_not_computed_and_outputs_and_gradients_are_those_of_computing_them(encoder, monkeypatch, kind, norm, positions, unpadded):
    inputs, found, operations = batch(), [], []
    for most in (attention.MOST, 0.0):
        monkeypatch.setattr(attention, "MOST", most)
        model = encoder(norm, positions=positions, kind=kind)
        model.config.unpadded = unpadded and kind is not TrimlineForCausalLM
        masks = masks_of_every_unit(model, 1, ("heads", "neurons", "attention", "feedforward"))
        masks["heads"][0], masks["neurons"][2], masks["feedforward"][1] = 0, 0, 0
        learned = {unit: mask.requires_grad_() for unit, mask in masks.items()}
        with FlopCounterMode(display=False) as counter:
            output = model(**inputs, masks={unit: mask * (mask != 0) for unit, mask in learned.items()})  # clipped at 0, as what is drawn
            logits = output["start_logits"] if "start_logits" in output else output["logits"]
            (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        operations.append(counter.get_total_flops())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append([logits.detach(), gradients, {unit: mask.grad for unit, mask in learned.items()}])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert operations[0] < 0.8 * operations[1]
