"""Untied positions find neighbours sooner than those added to words (Ke et al. 2021): seen in a hundred steps on a toy."""

from __future__ import annotations

import statistics

import torch

from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM

VOCABULARY, LENGTH, ROWS, STEPS, MASK = 64, 32, 32, 100, 4


def loss_of_previous_token(positions: str) -> float:
    """Mean loss of the last steps at: say, where a token is masked, which one stands before it; tokens are drawn evenly (ln 59 = 4.08)."""
    torch.manual_seed(0)
    config = TrimlineConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        head_dim=16,
        heads_per_layer=[4],
        ffn_per_layer=[256],
        positions=positions,
        dropout=0.0,
        max_position_embeddings=LENGTH,
        initializer_range=0.07,
    )
    model = TrimlineForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        ids = torch.randint(MASK + 1, VOCABULARY, (ROWS, LENGTH))
        masked = torch.rand(ROWS, LENGTH) < 0.15
        masked[:, :2] = False  # the first token is [CLS]'s place, which TUPE keeps apart
        loss = model(ids.masked_fill(masked, MASK), labels=ids.roll(1, dims=1).masked_fill(~masked, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.mean(losses[-20:])


def test_tupe_learns_to_look_at_the_previous_token_while_absolute_positions_are_still_on_their_plateau() -> None:
    found = {positions: loss_of_previous_token(positions) for positions in ("absolute", "tupe-absolute", "tupe-relative")}
    assert found["absolute"] > 3
    assert found["tupe-absolute"] < 2
    assert found["tupe-relative"] < 2
