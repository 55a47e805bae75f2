"""How long calls take, measured beside one another."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)

WARM_UP = 3


def milliseconds(
    calls: Mapping[Name, Callable[[], object]],
    repeats: int,
    device: torch.device,
    threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Name, list[float]], int | None]:
    """`repeats` times of each call, after a warm-up, and the threads of the CPU, which are `threads` where given; None on a GPU.

    The calls take turns, so that whatever else the machine does falls on all of them alike, and none finds its weights in a cache. CUDA events on a
    GPU; on a CPU the clock, in seconds. By `time.thread_time` a call of one thread takes as long as on an idle machine, whoever shares it: a wall
    clock sees long calls stretched, and not those that end within a time slice. Several threads wait for one another, whatever the clock.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    times: dict[Name, list[float]] = {name: [] for name in calls}
    try:
        for turn in range(WARM_UP + repeats):
            for name, call in calls.items():
                taken = _taken(call, device, clock)
                if turn >= WARM_UP:
                    times[name].append(taken)
    finally:
        torch.set_num_threads(before)
    return times, (threads or before) if device.type == "cpu" else None


def _taken(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    start_time = clock()
    call()
    return 1000 * (clock() - start_time)


def device_name(device: torch.device) -> str:
    """The accelerator or processor by its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
