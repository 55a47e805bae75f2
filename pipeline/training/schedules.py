"""The learning rate as a pure function of how far a training is, in steps or in time."""

from __future__ import annotations

import math

from pipeline.training.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int, steps: int, seconds: float = 0.0) -> float:
    """Learning rate of step `step` (from 0) of `steps`, after `seconds` of training.

    Rises linearly from `warmup_from` of the peak over the first `warmup_ratio` of the steps, so that the last of them has the peak,
    then falls to `min_lr_ratio` of it at the end: along a line, a half cosine, or not at all (`constant`). `inverse_sqrt` falls
    towards it as sqrt(warm-up / step) (Vaswani et al. 2017). `wsd` stays at the peak until the last `decay_ratio` of the steps, then falls as
    1 - sqrt(share of them) (warm-up, stable, decay: Hu et al. 2024; this form of decay: Hägele et al. 2024, section 3).
    With a time budget, a step counts as the one that has the same share of all steps as `seconds` of the budget, if that is later
    (Izsak et al. 2021, section 3).
    """
    at = max(step, steps * seconds / (60 * settings.time_budget)) if settings.time_budget else step
    warmup = round(settings.warmup_ratio * steps)
    if at < warmup:
        return settings.warmup_from * settings.lr + (1 - settings.warmup_from) * (settings.lr * min(1.0, (at + 1) / warmup))
    progress = min(1.0, (at - warmup) / max(1, steps - warmup))
    decaying = max(1, round(settings.decay_ratio * steps))
    decay = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(max(1, warmup) / (at + 1)),
        "wsd": 1 - math.sqrt(min(1.0, max(0.0, at - (steps - decaying)) / decaying)),
    }[settings.schedule]
    floor = 1.0 if settings.schedule == "constant" else settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * decay)
