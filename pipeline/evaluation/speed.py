"""How long a forward pass takes, measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.evaluation.settings import LatencySettings

WARM_UP = 3
QUARTILES = ("lower_quartile", "median", "upper_quartile")


@torch.inference_mode()
def latency(models: Mapping[str, PreTrainedModel], settings: LatencySettings, vocab: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Median and quartiles of a forward pass of each model in milliseconds, how many times faster than the first it is, and the circumstances.

    The models take turns pass by pass, so that whatever else the machine does falls on all of them alike. CUDA events on a GPU, the clock on a CPU.
    vocab: token ids are drawn below it. Rows are as long as the settings say, or as the shortest model allows.
    """
    device = torch.device(device)
    before = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        length = min(settings.length, *(model.config.max_position_embeddings for model in models.values()))
        input_ids = torch.from_numpy(np.random.default_rng(0).integers(vocab, size=(settings.batch_size, length))).to(device)
        for model in models.values():
            model.to(device).eval()  # type: ignore[arg-type]
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(WARM_UP + settings.repeats):
            for name, model in models.items():
                taken = _pass(model, input_ids)
                if turn >= WARM_UP:
                    times[name].append(taken)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    milliseconds = {name: dict(zip(QUARTILES, np.percentile(taken, [25, 50, 75]).tolist(), strict=True)) for name, taken in times.items()}
    first = next(iter(milliseconds.values()))["median"]
    return {
        "milliseconds": milliseconds,
        "speed_up": {name: first / quartiles["median"] for name, quartiles in milliseconds.items()},
        "batch_size": settings.batch_size,
        "length": length,
        "repeats": settings.repeats,
        "device": device_name(device),
        "threads": threads if device.type == "cpu" else None,
    }


def _pass(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    if input_ids.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(input_ids=input_ids)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    start_time = time.perf_counter()
    model(input_ids=input_ids)
    return 1000 * (time.perf_counter() - start_time)


def device_name(device: torch.device) -> str:
    """The accelerator or processor by its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
