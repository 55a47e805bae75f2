"""What the settings of a model's shape change, and that nothing else does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import layer_norm

from pipeline.errors import UserError
from pipeline.models import build, export, stock
from pipeline.models.modeling_trimline import TrimlineForCausalLM, TrimlineForMaskedLM, TrimlineModel
from pipeline.models.settings import ModelSettings


def decoder(make_config, **changes):
    torch.manual_seed(0)
    return TrimlineModel(make_config(**{"kind": "decoder", "norm": "pre", "dropout": 0.0, **changes}))


def test_sinusoids_are_fairseqs(make_config):
    model = decoder(make_config, positions="sinusoidal").eval()
    assert not list(model.embeddings.positions.parameters())
    waves = model.embeddings.positions.embed(torch.zeros(1, 5, 32), None)[0]
    for position in (0, 1, 4):
        for place in (0, 3, 15):
            angle = position / 10000 ** (place / 15)
            assert waves[position, place].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert waves[position, 16 + place].item() == pytest.approx(math.cos(angle), abs=1e-6)
    odd = decoder(make_config, positions="sinusoidal", hidden_size=31).embeddings.positions.embed(torch.zeros(1, 5, 31), None)
    assert not odd[..., -1].any()
    assert odd[0, 1, 15].item() == pytest.approx(math.cos(1))


def test_sinusoidal_positions_take_inputs_of_any_length_and_start_again_in_each_document(make_config, tokenizer):
    model = TrimlineForCausalLM(make_config(kind="decoder", positions="sinusoidal", max_position_embeddings=8)).eval()
    ids = torch.randint(5, 40, (1, 40))
    assert model(ids).logits.isfinite().all()
    build.check_fits(model, tokenizer, length=40)
    documents = torch.tensor([[0] * 15 + [1] * 25])
    torch.testing.assert_close(model(ids, document_ids=documents).logits[:, 15:], model(ids[:, 15:]).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="takes 8 tokens, rows have 40"):
        build.check_fits(TrimlineForCausalLM(make_config(kind="decoder", max_position_embeddings=8)), tokenizer, length=40)


def test_relu_lets_no_negative_neuron_through(make_config):
    feed_forward = decoder(make_config, activation="relu").layers[0].feed_forward
    x = torch.randn(5, 32)
    torch.testing.assert_close(feed_forward(x, None), feed_forward.down(feed_forward.up(x).clamp(min=0)))


@pytest.mark.parametrize("knob", ["attention_dropout", "activation_dropout"])
def test_a_dropout_of_its_own_acts_in_training_alone(make_config, rows, knob):
    model, plain = decoder(make_config, **{knob: 0.5}), decoder(make_config).eval()
    expected = plain(rows[0]).last_hidden_state
    assert torch.equal(model.eval()(rows[0]).last_hidden_state, expected)
    trained = [model.train()(rows[0]).last_hidden_state for _ in range(2)]
    assert not torch.equal(*trained)


def test_without_a_rate_of_its_own_attention_drops_out_as_the_rest(make_config):
    assert decoder(make_config, dropout=0.25).layers[0].attention.dropout == 0.25
    assert decoder(make_config, dropout=0.25, attention_dropout=0.0).layers[0].attention.dropout == 0.0


def test_without_a_final_norm_the_stack_ends_in_the_residual_stream(make_config, rows):
    with_norm, without = decoder(make_config).eval(), decoder(make_config, final_norm=False).eval()
    assert without.norm is None
    stream = without(rows[0]).last_hidden_state
    torch.testing.assert_close(layer_norm(stream, (32,), eps=1e-12), with_norm(rows[0]).last_hidden_state)
    torch.testing.assert_close(without(rows[0]).memory_states, with_norm(rows[0]).memory_states)


def test_scaled_embeddings_are_those_of_a_larger_table(make_config, rows):
    scaled, plain = decoder(make_config, scale_embeddings=True).eval(), decoder(make_config).eval()
    with torch.no_grad():
        plain.embeddings.word.weight *= math.sqrt(32)
    torch.testing.assert_close(scaled(rows[0]).last_hidden_state, plain(rows[0]).last_hidden_state)


@pytest.mark.parametrize("change", [{"activation_dropout": 0.1}, {"scale_embeddings": True}, {"positions": "sinusoidal"}])
def test_what_stock_bert_cannot_hold_is_exported_with_our_code(make_config, rows, tmp_path, change):
    model = TrimlineForMaskedLM(make_config(**change)).eval()
    assert not stock.is_stock_shaped(model.config)
    export.save(model, None, tmp_path)
    again = build.load(tmp_path).eval()
    torch.testing.assert_close(again(*rows).logits, model(*rows).logits)


def test_attentions_dropout_goes_to_stock_bert_and_comes_back(make_config):
    theirs = stock.export(TrimlineForMaskedLM(make_config(attention_dropout=0.3)))
    assert (theirs.config.hidden_dropout_prob, theirs.config.attention_probs_dropout_prob) == (0.1, 0.3)
    assert stock.convert(copy.deepcopy(theirs)).config.attention_dropout == 0.3


def test_settings_reach_the_model_and_contradictions_are_refused(tokenizer):
    shape = {"kind": "decoder", "hidden": 32, "heads": 4, "layers": 1, "ffn": 64, "norm": "pre"}
    knobs = {"activation": "relu", "attention_dropout": 0.2, "activation_dropout": 0.3, "final_norm": False, "scale_embeddings": True}
    config = build.new(ModelSettings(**shape, **knobs, positions="sinusoidal"), tokenizer).config
    assert {name: getattr(config, name) for name in knobs} == knobs
    assert config.positions == "sinusoidal"
    with pytest.raises(ValueError, match="final_norm: false is for norm: pre"):
        ModelSettings(final_norm=False)
