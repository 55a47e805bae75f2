"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pipeline.training.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

    Rises linearly from `warmup_from` of the peak over the first `warmup_ratio` of the steps, so that the last of them has the peak,
    then falls to `min_lr_ratio` of it at the end: along a line, a half cosine, or not at all (`constant`). `inverse_sqrt` falls
    towards it as sqrt(warm-up / step) (Vaswani et al. 2017).
    """
    warmup = round(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.warmup_from * settings.lr + (1 - settings.warmup_from) * (settings.lr * (step + 1) / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    decay = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(max(1, warmup) / (step + 1)),
    }[settings.schedule]
    floor = 1.0 if settings.schedule == "constant" else settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * decay)
