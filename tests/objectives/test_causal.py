from __future__ import annotations

import torch

from pipeline import objectives
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM
from pipeline.objectives.base import Trainee
from pipeline.objectives.settings import CausalSettings


def decoder() -> TrimlineForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "head_dim": 32, "heads_per_layer": [2, 2], "ffn_per_layer": [128, 128]}
    return TrimlineForCausalLM(TrimlineConfig(vocab_size=200, kind="decoder", norm="pre", dropout=0.0, **shape))


def batch_of(lengths: list[int], length: int = 24) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = 5 + (torch.arange(length) * 7 + torch.randint(0, 195, (len(lengths), 1))) % 195
    return {"input_ids": ids * mask, "attention_mask": mask, "segment": torch.arange(len(lengths))}


def test_every_token_but_the_first_is_a_target_and_padding_is_none(tokenizer):
    causal = objectives.build(CausalSettings(), tokenizer, seed=1)
    prepared = causal.prepare(batch_of([24, 10, 1]), step=0)
    assert causal.targets(prepared) == {"causal": 23 + 9 + 0}
    assert torch.equal(prepared["labels"] == -100, prepared["attention_mask"] == 0)


def test_padding_changes_no_loss(tokenizer):
    causal, model = objectives.build(CausalSettings(), tokenizer, seed=1), decoder().eval()
    short = batch_of([10], length=10)
    padded = {name: torch.nn.functional.pad(short[name], (0, 14)) for name in ("input_ids", "attention_mask")}
    losses = [causal(model, causal.prepare(batch, 0), 0)["causal"] for batch in (short, padded)]
    assert torch.allclose(*losses, atol=1e-5)


def test_the_first_token_predicts_the_second(tokenizer):
    causal, model = objectives.build(CausalSettings(), tokenizer, seed=1), decoder().eval()
    batch = batch_of([2], length=2)
    expected = -model(batch["input_ids"]).logits[0, 0].log_softmax(-1)[batch["input_ids"][0, 1]]
    assert torch.allclose(causal(model, causal.prepare(batch, 0), 0)["causal"], expected, atol=1e-5)


def test_the_loss_of_a_row_of_documents_is_the_mean_over_their_own_rows_weighted_by_targets(tokenizer):
    causal, model = objectives.build(CausalSettings(), tokenizer, seed=1), decoder().eval()
    lengths = [7, 1, 10]
    alone = [causal.prepare(batch_of([length], length=length), 0) for length in lengths]
    row = {name: torch.cat([batch[name] for batch in alone], dim=1) for name in ("input_ids", "attention_mask")}
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = {name: torch.nn.functional.pad(ids, (0, 6)) for name, ids in row.items()}
    packed = causal.prepare({**packed, "document_ids": torch.nn.functional.pad(documents, (0, 6), value=-1)}, 0)
    assert causal.targets(packed) == {"causal": 6 + 0 + 9}, "a document's first token is predicted from another document"
    expected = sum(causal(model, batch, 0)["causal"] * causal.targets(batch)["causal"] for batch in alone) / 15
    assert torch.allclose(causal(model, packed, 0)["causal"], expected, atol=1e-5)


def test_a_tiny_decoder_learns_a_toy_language(tokenizer):
    trainee = Trainee(decoder(), objectives.build(CausalSettings(), tokenizer, seed=1))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=3e-3)
    losses = []
    for step in range(80):
        loss = trainee(trainee.prepare(batch_of([24] * 32), step), step)["causal"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5  # log 200 = 5.3 nats
    assert losses[-1] < 0.5


def test_in_chunks_loss_and_gradients_are_the_same(tokenizer):
    batch = batch_of([24, 10, 1])
    found = []
    for chunk in (None, 5):
        causal, model = objectives.build(CausalSettings(chunk=chunk), tokenizer, seed=1), decoder().train()
        loss = causal(model, causal.prepare(batch, 0), 0)["causal"]
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
