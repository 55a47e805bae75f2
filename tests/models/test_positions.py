"""Position schemes: the published formulas and numbers, and what holds for all of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import build
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM, TrimlineModel
from pipeline.models.positions import SCHEMES, relative_buckets, rotate, slopes
from pipeline.models.settings import ModelSettings

TUPE = ("tupe-absolute", "tupe-relative")
ENCODERS = tuple(SCHEMES)
DECODERS = ("absolute", "sinusoidal", "rope", "alibi")
UNBOUNDED = ("sinusoidal", "rope", "alibi", *TUPE)
OFFICIAL = {
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
    "feed_forward_norm": "final_layer_norm",
}


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    """Inputs, weights and outputs of the authors' code: 2 layers of width 8, 2 heads."""
    with np.load(Path(__file__).with_name("tupe.npz")) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def official(vectors: dict[str, Tensor]) -> TrimlineModel:
    """Our model with the weights of the authors'."""
    shape = {"vocab_size": 30, "hidden_size": 8, "head_dim": 4, "heads_per_layer": [2, 2], "ffn_per_layer": [16, 16], "max_position_embeddings": 12}
    model = TrimlineModel(TrimlineConfig(**shape, positions="tupe-absolute", layer_norm_eps=1e-5, pad_token_id=1), add_pooling_layer=False)
    names = {"embeddings.word": "embed_tokens", "embeddings.norm": "emb_layer_norm", "embeddings.positions.table": "pos"}
    names |= {f"embeddings.positions.{ours}": f"pos_{theirs}" for ours, theirs in (("norm", "ln"), ("query", "q_linear"), ("key", "k_linear"))}
    names |= {f"layers.{layer}.{ours}": f"layers.{layer}.{theirs}" for layer in range(2) for ours, theirs in OFFICIAL.items()}
    weights = {f"{ours}.{leaf}": vectors.get(f"w_{theirs}.{leaf}") for ours, theirs in names.items() for leaf in ("weight", "bias")}
    for layer in range(2):
        for leaf in ("weight", "bias"):
            parts = vectors[f"w_layers.{layer}.self_attn.in_proj_{leaf}"].chunk(3)
            weights |= {f"layers.{layer}.attention.{name}.{leaf}": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
    model.load_state_dict({name: tensor for name, tensor in weights.items() if tensor is not None})
    return model.eval()


def encoder(make_config, scheme, **changes):
    torch.manual_seed(0)
    model = TrimlineModel(make_config(**{"positions": scheme, "dropout": 0.0, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and LayerNorms start where mistakes with them do not show
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def bias_of(model, length, position_ids=None):
    return model.embeddings.positions.bias(torch.zeros(1, length, dtype=torch.long), position_ids)


def test_buckets_are_the_published_codes(vectors):
    assert torch.equal(relative_buckets(vectors["relative_position"]), vectors["bucket32_128"])
    known = {-91: 15, -64: 14, -20: 10, -9: 8, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23, 8: 24, 9: 24, 20: 26, 64: 30, 91: 31, 10**6: 31}
    assert relative_buckets(torch.tensor(list(known))).tolist() == list(known.values())
    assert 16 not in vectors["bucket32_128"]


def test_tupe_gives_the_bias_and_the_outputs_of_the_authors_code(vectors):
    model = official(vectors)
    tokens = vectors["tokens"]
    bias = bias_of(model, 7)
    torch.testing.assert_close(bias, vectors["final_bias_HxLxL"], atol=1e-5, rtol=0)
    torch.testing.assert_close(bias[:, 0, 0], vectors["theta1_cls2other"], atol=1e-5, rtol=0)
    torch.testing.assert_close(bias[:, 1, 0], vectors["theta2_other2cls"], atol=1e-5, rtol=0)
    states = model(tokens, tokens != 1, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, ("embedding_out", "hidden_1", "hidden_2"), strict=True):
        torch.testing.assert_close(ours[tokens != 1], vectors[theirs][tokens != 1], atol=1e-5, rtol=0)


def test_tupe_relative_adds_the_scalar_of_each_distance_with_two_more_for_cls(make_config):
    model = encoder(make_config, "tupe-relative")
    scheme = model.embeddings.positions
    scalars, relative = scheme.relative.table.weight, bias_of(model, 12)
    absolute = super(SCHEMES["tupe-relative"], scheme).bias(torch.zeros(1, 12), None)
    for query in range(12):
        for key in range(12):
            bucket = 16 if query == 0 else 32 if key == 0 else int(relative_buckets(torch.tensor(key - query)))
            torch.testing.assert_close(relative[:, query, key], absolute[:, query, key] + scalars[bucket])
    with torch.no_grad():
        scalars.zero_()
    assert torch.equal(bias_of(model, 12), absolute), "with scalars of 0, TUPE-R is TUPE-A"


def test_bert_with_a_relative_bias_has_the_plain_buckets(make_config):
    model = encoder(make_config, "absolute-relative")
    scalars = model.embeddings.positions.relative.table.weight
    distances = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    torch.testing.assert_close(bias_of(model, 9), scalars[relative_buckets(distances)].permute(2, 0, 1))
    assert scalars.shape == (32, 4)


@pytest.mark.parametrize("scheme", TUPE)
def test_cls_has_one_score_with_all_keys_and_one_with_all_queries(make_config, scheme):
    bias = bias_of(encoder(make_config, scheme), 10)
    assert (bias[:, 0] == bias[:, :1, 0]).all()
    assert (bias[:, 1:, 0] == bias[:, 1:2, 0]).all()
    assert (bias[:, 0, 0] != bias[:, 1, 0]).all()
    assert (bias[:, 1:, 1:].flatten(1).std(dim=1) > 1e-3).all()


@pytest.mark.parametrize("scheme", TUPE)
def test_tied_cls_is_a_position_as_any_other(make_config, scheme):
    model = encoder(make_config, scheme, untie_cls=False)
    positions = model.embeddings.positions
    assert positions.table.num_embeddings == 16
    query, key = (project(positions.norm(positions.table.weight)).unflatten(1, (4, 8)) for project in (positions.query, positions.key))
    expected = torch.einsum("ihd,jhd->hij", query, key) / 4
    if scheme == "tupe-relative":
        assert positions.relative.table.num_embeddings == 32
        expected = expected + positions.relative(16, torch.device("cpu"))
    torch.testing.assert_close(bias_of(model, 16), expected)


def test_words_and_positions_are_scaled_by_the_root_of_twice_the_head_width(make_config):
    small = TrimlineConfig(hidden_size=8, head_dim=4, heads_per_layer=[2], ffn_per_layer=[8], positions="tupe-absolute")
    base = make_config(hidden_size=768, head_dim=64, heads_per_layer=[12], ffn_per_layer=[8], positions="tupe-relative")
    for config, scale in ((small, 0.353553), (base, 0.0883883)):
        assert TrimlineModel(config).layers[0].attention.scale == pytest.approx(scale, rel=1e-5)


def test_tupe_base_adds_the_published_number_of_parameters(make_config):
    """Table and projections of 513 rows, 768 dimensions, 12 heads: 1,577,100, in place of BERT's 393,216."""
    shape = {"hidden_size": 768, "head_dim": 64, "heads_per_layer": [12], "ffn_per_layer": [8], "max_position_embeddings": 512}
    with torch.device("meta"):
        scheme = SCHEMES["tupe-relative"](make_config(**shape, positions="tupe-relative"))
    assert sum(parameter.numel() for parameter in scheme.parameters()) == 1_577_100


@pytest.mark.parametrize("scheme", [*TUPE, "absolute-relative"])
def test_the_gradient_of_the_bias_is_the_sum_over_layers_and_rows(make_config, rows, scheme):
    """As if each layer and row had positions of its own, and their gradients were added."""
    model = encoder(make_config, scheme)
    positions = model.embeddings.positions
    ids, mask = rows
    found = positions.relative.table.weight if hasattr(positions, "relative") else positions.query.weight

    def gradient(ids, mask, layers):
        model.zero_grad()
        hooks = [
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].detach(), inputs[2].detach(), *inputs[3:]))
            for number, block in enumerate(model.layers)
            if number not in layers
        ]
        model(ids, mask).last_hidden_state[mask.bool()].square().sum().backward()
        for hook in hooks:
            hook.remove()
        return found.grad.clone()

    whole = gradient(ids, mask, (0, 1))
    parts = [gradient(ids[row : row + 1], mask[row : row + 1], (layer,)) for row in range(len(ids)) for layer in (0, 1)]
    assert all(part.abs().max() > 1e-4 for part in parts)
    torch.testing.assert_close(whole, sum(parts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ENCODERS)
def test_padding_leaks_nowhere(make_config, rows, scheme):
    model = encoder(make_config, scheme).eval()
    ids, mask = rows
    padded = model(ids, mask).last_hidden_state
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        torch.testing.assert_close(padded[row, :length], model(ids[row : row + 1, :length]).last_hidden_state[0], atol=1e-5, rtol=1e-5)
    assert model(ids, mask * torch.tensor([[1], [0], [1]])).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("scheme", ENCODERS)
def test_documents_of_a_row_come_out_as_without_the_others(make_config, scheme):
    """The first as alone; a later one, which has no [cls], as behind a row's [cls] that it does not see."""
    model = encoder(make_config, scheme).eval()
    ids, documents = torch.randint(5, 40, (2, 14)), torch.tensor([0] * 5 + [1] * 3 + [2] * 6).expand(2, -1)
    together = model(ids, document_ids=documents).last_hidden_state
    torch.testing.assert_close(together[:, :5], model(ids[:, :5]).last_hidden_state, atol=1e-5, rtol=1e-5)
    for first, last in ((5, 8), (8, 14)):
        behind = torch.cat([torch.full((2, 1), 2), ids[:, first:last]], dim=1)
        alone = model(behind, document_ids=torch.tensor([0] + [1] * (last - first)).expand(2, -1)).last_hidden_state
        torch.testing.assert_close(together[:, first:last], alone[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", TUPE)
def test_tokens_of_later_documents_have_positions_from_1_and_no_reset(make_config, scheme):
    model = encoder(make_config, scheme)
    packed, alone = bias_of(model, 9, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))[0], bias_of(model, 9)
    torch.testing.assert_close(packed[:, :4, :4], alone[:, :4, :4])
    torch.testing.assert_close(packed[:, 4:, 4:], alone[:, 1:6, 1:6])


@pytest.mark.parametrize("scheme", UNBOUNDED)
def test_inputs_longer_than_trained_on_are_taken(make_config, tokenizer, scheme):
    model = encoder(make_config, scheme, vocab_size=40).eval()
    build.check_fits(model, tokenizer, length=50)
    ids = torch.randint(5, 40, (2, 50))
    assert model(ids).last_hidden_state.isfinite().all()
    assert model(ids, document_ids=torch.tensor([0] * 20 + [1] * 30).expand(2, -1)).last_hidden_state.isfinite().all()


def test_tupe_sees_a_longer_input_as_its_span_seen_finer(make_config):
    model = encoder(make_config, "tupe-absolute")
    learned, longer = bias_of(model, 16), bias_of(model, 30)  # positions 1 to 15, and 1 to 29 in half steps
    torch.testing.assert_close(longer[:, 0, 5], learned[:, 0, 5])
    torch.testing.assert_close(longer[:, 5, 0], learned[:, 5, 0])
    torch.testing.assert_close(longer[:, 1::2, 1::2], learned[:, 1:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(longer[:, 2, 1::2], (learned[:, 1, 1:] + learned[:, 2, 1:]) / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["absolute", "absolute-relative"])
def test_tables_that_end_say_so(make_config, tokenizer, scheme):
    model = encoder(make_config, scheme)
    with pytest.raises(ValueError, match=r"17 tokens.* positions for 16"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(UserError, match="takes 16 tokens, rows have 17"):
        build.check_fits(model, tokenizer, length=17)


def test_rope_turns_so_that_scores_know_distances_alone(make_config):
    scheme = encoder(make_config, "rope").embeddings.positions
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(of_query, of_key):
        turned = (rotate(x, scheme.rotation(x[0], torch.tensor([[place]]))) for x, place in ((query, of_query), (key, of_key)))
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(score(3, 7), score(103, 107), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score(5, 5), (query * key).sum())
    assert not torch.isclose(score(3, 7), score(7, 3))
    turned = rotate(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])[None, None, None], scheme.rotation(query[0], torch.tensor([[2]])))[0, 0, 0]
    torch.testing.assert_close(turned[[0, 4]], torch.tensor([math.cos(2), math.sin(2)]))


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12, 20])
def test_alibis_slopes_are_the_papers_also_between_powers_of_two(heads):
    """The recursion of the authors' code: a geometric series, then every other slope of the series twice as long."""

    def paper(n):
        if math.log2(n).is_integer():
            start = 2 ** -(2 ** -(math.log2(n) - 3))
            return [start * start**i for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return paper(below) + paper(2 * below)[0::2][: n - below]

    assert slopes(heads) == pytest.approx(paper(heads))


def test_alibi_is_symmetric_in_encoders_and_hides_a_decoders_future(make_config):
    model = encoder(make_config, "alibi")
    bias = bias_of(model, 5)
    assert torch.equal(bias, bias.transpose(1, 2))
    torch.testing.assert_close(bias[:, 4, 1], -3 * torch.tensor(slopes(4)))
    decoder = encoder(make_config, "alibi", kind="decoder").eval()
    ids = torch.randint(5, 40, (2, 9))
    torch.testing.assert_close(decoder(ids).last_hidden_state[:, :5], decoder(ids[:, :5]).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", DECODERS)
def test_a_decoders_past_does_not_change_with_what_follows(make_config, scheme):
    model = encoder(make_config, scheme, kind="decoder", norm="pre").eval()
    ids = torch.randint(5, 40, (2, 9))
    for mask in (None, torch.ones_like(ids)):
        short = None if mask is None else mask[:, :5]
        torch.testing.assert_close(model(ids, mask).last_hidden_state[:, :5], model(ids[:, :5], short).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ENCODERS)
def test_order_matters(make_config, scheme):
    model = encoder(make_config, scheme).eval()
    ids = torch.tensor([[2, 7, 8, 9, 10, 11]])
    swapped = torch.tensor([[2, 7, 9, 8, 10, 11]])
    assert (model(ids).last_hidden_state[:, 1] - model(swapped).last_hidden_state[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", ENCODERS)
def test_checkpointed_activations_give_the_same_gradients(make_config, rows, scheme):
    plain = TrimlineForMaskedLM(make_config(positions=scheme, dropout=0.1)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        model(*rows, labels=rows[0]).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("way", ["autocast", "bf16"])
@pytest.mark.parametrize("scheme", ENCODERS)
def test_half_precision_runs_near_fp32(make_config, rows, scheme, way):
    model = TrimlineForMaskedLM(make_config(positions=scheme, initializer_range=0.05)).eval()
    exact = model(*rows).logits
    rounded = copy.deepcopy(model).bfloat16() if way == "bf16" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        logits = rounded(*rows).logits
        bias = bias_of(rounded.model, 8)
    assert logits.dtype == torch.bfloat16
    assert bias is None or bias.dtype == torch.float32
    assert (exact - logits.float()).abs().max() < 0.1 * exact.abs().max()
    logits.float().square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in rounded.parameters())


def test_absolute_positions_are_the_plain_formula_bit_for_bit(make_config, rows):
    """Attention without a scheme's help: the kernel called with nothing but the padding mask."""
    model = encoder(make_config, "absolute").eval()
    ids, mask = rows
    x = model.embeddings.norm(model.embeddings.word(ids) + model.embeddings.positions.table(torch.arange(12)))
    for block in model.layers:
        attention = block.attention
        heads = [project(x).unflatten(-1, (4, 8)).transpose(1, 2) for project in (attention.query, attention.key, attention.value)]
        context = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None].bool())
        x = block.attention_norm(x + attention.output(context.transpose(1, 2).flatten(2)))
        x = block.feed_forward_norm(x + block.feed_forward.down(torch.nn.functional.gelu(block.feed_forward.up(x))))
    assert torch.equal(model(ids, mask).last_hidden_state, x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "decoder", "positions": "tupe-relative"}, "tupe-relative are for kind: encoder"),
        ({"kind": "decoder", "positions": "absolute-relative"}, "absolute-relative are for kind: encoder"),
        ({"untie_cls": False}, "untie_cls: false is for tupe-absolute and tupe-relative"),
        ({"positions": "rope", "hidden": 36, "heads": 4}, "have an odd one"),
    ],
)
def test_positions_that_a_model_cannot_have_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**fields)


def test_a_model_of_the_wrong_kind_is_refused_also_by_its_configuration(make_config):
    with pytest.raises(ValueError, match="tupe-absolute are for a model of kind encoder"):
        TrimlineModel(make_config(kind="decoder", positions="tupe-absolute"))


def test_the_settings_reach_the_model(tokenizer):
    settings = ModelSettings(hidden=32, heads=4, layers=1, ffn=64, positions="tupe-absolute", untie_cls=False)
    config = build.new(settings, tokenizer).config
    assert (config.positions, config.untie_cls) == ("tupe-absolute", False)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_recipe_knows_which_schemes_have_an_end(name):
    assert ModelSettings(positions=name).bounded == SCHEMES[name].bounded
