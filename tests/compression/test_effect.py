"""The whole method on a small encoder and a task it learns in seconds, with a plain training loop in place of DeepSpeed."""

import copy

import pytest
import torch

from pipeline.compression.distillation import Distillation
from pipeline.compression.layer_distillation import LayerDistillation, teacher_layers
from pipeline.compression.masks import Masks
from pipeline.compression.settings import DistillationSettings, SparsitySettings
from pipeline.compression.sparsity import Prunable
from pipeline.compression.surgery import remove
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForSequenceClassification
from pipeline.models.size import block_parameters
from pipeline.objectives.classify import Classify

STEPS = 160


def examples(step, rows=32):
    """Are more of the row's eleven tokens even or odd? The first token, which is classified, learns it by attention alone."""
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(2, 24, (rows, 12), generator=generator)
    input_ids[:, 0] = 1
    labels = (input_ids[:, 1:] % 2).float().mean(1).gt(0.5).long()
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def fit(model, losses_of, steps, side=None, lr=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    side_optimizer = side.optimizer() if side else None
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        if side:
            side.before_step(step)
        sum(losses_of(model, examples(step), step).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in filter(None, (optimizer, side_optimizer)):
            each.step()
            each.zero_grad()
        if side:
            side.after_step(step)
    return model.eval()


def accuracy(model, masks=None):
    data = examples(10**6, rows=500)
    with torch.no_grad():
        predicted = model(data["input_ids"], data["attention_mask"], masks=masks).logits.argmax(-1)
    return (predicted == data["labels"]).float().mean().item()


def test_sixty_percent_of_an_encoder_goes_and_its_score_stays():
    torch.manual_seed(0)
    config = TrimlineConfig(
        vocab_size=24,
        hidden_size=32,
        head_dim=8,
        heads_per_layer=[4, 4],
        ffn_per_layer=[128, 128],
        dropout=0.0,
        max_position_embeddings=16,
        num_labels=2,
    )
    teacher = fit(TrimlineForSequenceClassification(config), Classify(), 200)
    score = accuracy(teacher)
    masks = Masks(Prunable(2, 32, 4, 128), SparsitySettings(), target=0.6, steps=STEPS, seed=1)
    student = fit(
        copy.deepcopy(teacher), Distillation(teacher, DistillationSettings(), masks, LayerDistillation(teacher_layers(2), 32)), STEPS, side=masks
    )
    settled, _ = masks.settle()
    removed = remove(student, settled)
    recovered = fit(copy.deepcopy(removed), Distillation(teacher, DistillationSettings(layers=0)), 40, lr=1e-3)
    assert 1 - block_parameters(removed.config) / block_parameters(config) == pytest.approx(0.6, abs=0.01)
    assert accuracy(removed) == accuracy(student, settled)
    assert score > 0.9
    assert accuracy(recovered) > score - 0.03
