"""How long a forward pass takes, measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.evaluation.settings import LatencySettings
from pipeline.models.stopwatch import device_name, milliseconds

QUARTILES = ("lower_quartile", "median", "upper_quartile")


@torch.inference_mode()
def latency(models: Mapping[str, PreTrainedModel], settings: LatencySettings, vocab: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Median and quartiles of a forward pass of each model in milliseconds, how many times faster than the first it is, and the circumstances.

    The models take turns pass by pass, so that whatever else the machine does falls on all of them alike.
    vocab: token ids are drawn below it. Rows are as long as the settings say, or as the shortest model allows.
    """
    device = torch.device(device)
    length = min(settings.length, *(model.config.max_position_embeddings for model in models.values()))
    input_ids = torch.from_numpy(np.random.default_rng(0).integers(vocab, size=(settings.batch_size, length))).to(device)
    for model in models.values():
        model.to(device).eval()  # type: ignore[arg-type]
    calls = {name: partial(model, input_ids=input_ids) for name, model in models.items()}
    times, threads = milliseconds(calls, settings.repeats, device, settings.threads)
    quartiles = {name: dict(zip(QUARTILES, np.percentile(taken, [25, 50, 75]).tolist(), strict=True)) for name, taken in times.items()}
    first = next(iter(quartiles.values()))["median"]
    return {
        "milliseconds": quartiles,
        "speed_up": {name: first / each["median"] for name, each in quartiles.items()},
        "batch_size": settings.batch_size,
        "length": length,
        "repeats": settings.repeats,
        "device": device_name(device),
        "threads": threads,
    }
