"""adaptive.npz: an adaptive softmax of the original implementation (fairseq, through TRIME's code), 40 words in bands of 12, 12 and 16, d = 16,
factor 2, in fp64: its parameters, hidden states [3, 7, 16], targets, log partition and cross-entropy of each. No target is the second word of
a tail, whose loss that implementation leaves out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import build, export, size
from pipeline.models.adaptive import AdaptiveEmbedding, AdaptiveHead
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineForCausalLM
from pipeline.models.settings import ModelSettings
from pipeline.training import engine
from pipeline.training.deepspeed_config import render
from pipeline.training.settings import TrainSettings

ADAPTIVE = {"cutoffs": [12, 24], "factor": 2, "tie_projections": True, "dropout": 0.0}


@pytest.fixture
def original():
    arrays = np.load(Path(__file__).with_name("adaptive.npz"))
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def head(original):
    head = AdaptiveHead(16, 40, **ADAPTIVE).double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(original[name])
    return head


@pytest.fixture
def model(make_config):
    return TrimlineForCausalLM(make_config(kind="decoder", norm="pre", dropout=0.0, adaptive=ADAPTIVE))


@pytest.mark.parametrize("chunk", [None, 4])
def test_partition_and_cross_entropy_are_the_original_implementations(head, original, chunk):
    partition, score = head.scores(original["hidden"].flatten(0, 1), original["targets"].flatten(), chunk)
    torch.testing.assert_close(partition, original["partition"], rtol=1e-10, atol=0)
    torch.testing.assert_close(partition - score, original["token_loss"], rtol=1e-10, atol=0)


def test_scores_of_the_whole_vocabulary_hold_those_of_the_targets(head, original):
    hidden, targets = original["hidden"].flatten(0, 1), original["targets"].flatten()
    scores = head(hidden)
    partition, score = head.scores(hidden, targets)
    torch.testing.assert_close(scores.logsumexp(1), partition)
    torch.testing.assert_close(scores.gather(1, targets[:, None])[:, 0], score)
    assert torch.equal(head(original["hidden"]), scores.unflatten(0, (3, 7)))


def test_chunks_give_the_gradients_of_the_whole(head, original):
    def gradients(chunk):
        hidden = original["hidden"].flatten(0, 1).requires_grad_()
        partition, score = head.scores(hidden, original["targets"].flatten(), chunk)
        return torch.autograd.grad((partition - 2 * score).sum(), [hidden, *head.parameters()])

    for whole, parts in zip(gradients(None), gradients(5), strict=True):
        torch.testing.assert_close(parts, whole)


def test_a_tail_without_a_target_has_a_gradient_of_zero(head):
    partition, score = head.scores(torch.randn(3, 16).double(), torch.tensor([1, 2, 30]))
    (partition - score).sum().backward()
    assert head.table_1.grad.count_nonzero() == 0
    assert head.table_2.grad.count_nonzero() > 0


def test_embeddings_are_each_bands_table_through_its_projection():
    embedding = AdaptiveEmbedding(16, 40, [12, 24], 2)
    ids = torch.tensor([[0, 11, 12], [23, 24, 39]])
    found = embedding(ids)
    for row, column, band, place in ((0, 0, 0, 0), (0, 1, 0, 11), (0, 2, 1, 0), (1, 0, 1, 11), (1, 1, 2, 0), (1, 2, 2, 15)):
        vector = getattr(embedding, f"projection_{band}") @ getattr(embedding, f"table_{band}")[place]
        torch.testing.assert_close(found[row, column], vector)
    assert [tuple(p.shape) for p in embedding.parameters()] == [(12, 16), (16, 16), (12, 8), (16, 8), (16, 4), (16, 4)]


def test_embeddings_of_every_band_are_of_about_one_size_at_the_start():
    embedding = AdaptiveEmbedding(512, 6000, [2000, 4000], 4)
    for start, width in ((0, 512), (2000, 128), (4000, 32)):
        found = embedding(torch.arange(start, start + 2000)).square().mean()
        assert found.item() == pytest.approx(2 / (512 + width), rel=0.1)


@pytest.mark.parametrize("tie_projections", [True, False])
def test_the_softmax_uses_the_inputs_tables(make_config, tie_projections):
    model = TrimlineForCausalLM(make_config(kind="decoder", adaptive={**ADAPTIVE, "tie_projections": tie_projections}))
    head, word = model.head, model.model.embeddings.word
    assert head.table_0 is word.table_0
    assert head.table_2 is word.table_2
    assert (head.projection_1 is word.projection_1) == tie_projections


def test_the_loss_is_that_of_the_whole_vocabularys_scores_and_no_logits_are_made(model, rows):
    ids, mask = rows
    labels = ids.masked_fill(mask == 0, -100)
    output = model.eval()(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_causal_reader_takes_the_heads_own_scores(model, rows):
    reader = CausalReader(model)
    reader.check()
    hidden, memory = reader.read(input_ids=rows[0])
    assert memory.shape == hidden.shape
    partition, score = reader.scores(hidden.flatten(0, 1), rows[0].flatten(), chunk=5)
    everything = reader.logits(hidden).flatten(0, 1)
    torch.testing.assert_close(partition, everything.logsumexp(1))
    torch.testing.assert_close(score, everything.gather(1, rows[0].flatten()[:, None])[:, 0])


def test_dropout_acts_in_training_alone(make_config, rows):
    model = TrimlineForCausalLM(make_config(kind="decoder", dropout=0.0, adaptive={**ADAPTIVE, "dropout": 0.5}))
    reader = CausalReader(model.train())
    hidden, _ = reader.read(input_ids=rows[0])
    found = [reader.scores(hidden.flatten(0, 1), rows[0].flatten())[0] for _ in range(2)]
    assert not torch.equal(*found)
    model.eval()
    assert torch.equal(*(reader.scores(hidden.flatten(0, 1), rows[0].flatten())[0] for _ in range(2)))


FRESH = """
import sys
sys.modules["pipeline"] = None
import torch, transformers
ids = torch.load("ids.pt")
model = transformers.AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
torch.save((model(ids, labels=ids).loss, model(ids).logits, model.generate(ids[:, :4], max_new_tokens=2, do_sample=False)), "found.pt")
"""


def test_an_exported_model_gives_the_same_loss_where_trimline_is_not(model, rows, tmp_path):
    ids = rows[0][:1]
    export.save(model.eval(), None, tmp_path / "model")
    again = build.load(tmp_path / "model", head="causal").eval()
    assert torch.equal(again(ids, labels=ids).loss, model(ids, labels=ids).loss)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss, logits, generated = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    torch.testing.assert_close(logits, model(ids).logits)
    assert generated.shape == (1, 6)


class Scored(torch.nn.Module):
    """As an objective reads a model: its hidden states, then the head's scores in chunks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        hidden, _ = CausalReader(self.model).read(input_ids=ids)
        partition, score = CausalReader(self.model).scores(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), chunk=8)
        return (partition - score).mean()


def test_under_zero3_loss_and_gradients_are_plain_torchs(model, rows):
    ids, plain = rows[0], Scored(model)
    plain(ids).backward()
    expected = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
    loss = plain(ids).item()
    plain.zero_grad()
    from deepspeed.utils import safe_get_full_grad

    engine.start()
    settings = TrainSettings(batch_size=3, micro_batch_size=3, gradient_clipping=0.0)
    ds = engine.build(plain, render("zero3", settings, rows=3, world=1), settings)
    try:
        found = ds(ids)
        assert found.item() == pytest.approx(loss, abs=1e-6)
        ds.backward(found)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(safe_get_full_grad(parameter), expected[name], atol=1e-6, rtol=1e-4)
    finally:
        engine.close(ds)


def test_cutoffs_beyond_the_vocabulary_or_bands_without_width_are_refused(tokenizer):
    shape = {"kind": "decoder", "hidden": 32, "heads": 4, "norm": "pre"}
    with pytest.raises(UserError, match=r"model\.adaptive\.cutoffs: 30 is beyond the vocabulary, which has 25 tokens"):
        build.new(ModelSettings(**shape, adaptive={"cutoffs": [10, 30]}), tokenizer)
    for adaptive, message in (({"cutoffs": [10, 10]}, "do not rise"), ({"cutoffs": [5, 10], "factor": 8}, "no width")):
        with pytest.raises(ValueError, match=message):
            ModelSettings(**shape, adaptive=adaptive)
    with pytest.raises(ValueError, match="kind: decoder"):
        ModelSettings(adaptive={"cutoffs": [10]})


def test_flops_of_the_loss_are_near_those_torch_counts_for_zipfs_words(make_config):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    adaptive = {**ADAPTIVE, "cutoffs": [200, 1000]}
    model = TrimlineForCausalLM(make_config(kind="decoder", vocab_size=4000, adaptive=adaptive, max_position_embeddings=256)).eval()
    ids = torch.multinomial(1 / torch.arange(1.0, 4001), 4 * 256, replacement=True).view(4, 256)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, labels=ids)
    assert size.flops_per_token(model.config, 256) * 4 * 256 == pytest.approx(counter.get_total_flops(), rel=0.03)
