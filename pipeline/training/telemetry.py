"""What a person watches while it trains: one log line, `metrics.jsonl`, TensorBoard. First rank only.

`metrics.jsonl` has a line for every step: step, loss (the weighted sum), losses by name, learning rate, gradient norm before
clipping, ratios of losses, values of the side module. Every `log_every`-th also has rates, and the seconds of training so far; those steps
go to the log and to TensorBoard. A ratio of one step is noisy: TensorBoard's is that of the sums over the steps since its last point.
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

METRICS = "metrics.jsonl"

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense bfloat16 tensor-core operations a second, from NVIDIA's data sheets; the first name that is in the device's counts."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of one device in operations a second; None where it is not known, or training is not in bf16."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def quotients(ratios: Mapping[str, tuple[str, str]], losses: Mapping[str, float]) -> dict[str, float]:
    """Each ratio's numerator over its denominator, by name; without those whose denominator is 0: nothing of its kind was met."""
    return {name: losses[above] / losses[below] for name, (above, below) in ratios.items() if losses[below]}


class Telemetry:
    """Writes into `logs`, going on after `start` finished steps: later lines of an interrupted run are removed.

    time_budget: minutes of training at which it ends even before `steps`, or None. ratios: see `quotients`.
    """

    def __init__(
        self,
        logs: Path,
        *,
        title: str,
        start: int,
        steps: int,
        time_budget: float | None = None,
        ratios: Mapping[str, tuple[str, str]] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        logs.mkdir(parents=True, exist_ok=True)
        self.title = title
        self.steps, self.time_budget = steps, time_budget
        self.ratios = ratios or {}
        self._sums = dict.fromkeys(itertools.chain(*self.ratios.values()), 0.0)
        self._start = start
        self._began = time.monotonic()
        _cut(logs / METRICS, start)
        self._lines = open(logs / METRICS, "a", encoding="utf-8")  # noqa: SIM115 closed in close()
        self._board = SummaryWriter(str(logs), purge_step=start + 1)

    def record(self, records: list[dict[str, Any]]) -> None:
        """One record a step, in order, as `metrics.jsonl` keeps them; those with `tokens_per_second` are shown."""
        for record in records:
            self._lines.write(json.dumps(record) + "\n")
            for name in self._sums:
                self._sums[name] += record["losses"][name]
            if "tokens_per_second" in record:
                self._show(record)
        self._lines.flush()

    def _show(self, record: dict[str, Any]) -> None:
        step = record["step"]
        groups = record | {"losses": record["losses"] | quotients(self.ratios, self._sums)}
        self._sums = dict.fromkeys(self._sums, 0.0)
        for name, value in groups.items():
            if name in ("step", "seconds", "ratios") or value is None:
                continue
            parts = {f"{name}/{part}": number for part, number in value.items()} if isinstance(value, dict) else {name: value}
            for tag, number in parts.items():
                self._board.add_scalar(tag, number, step)
        self._board.flush()
        seconds = (time.monotonic() - self._began) / max(1, step - self._start) * (self.steps - step)
        if self.time_budget is not None:
            seconds = min(seconds, max(0.0, 60 * self.time_budget - record["seconds"]))
        line = [
            f"step {step}/{self.steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            *([f"MFU {record['mfu']:.1%}"] if record.get("mfu") is not None else []),
            f"ETA {_clock(seconds)}",
        ]
        print(f"{self.title}: {'  '.join(line)}", flush=True)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _cut(path: Path, start: int) -> None:
    """Removes the lines of steps after `start`, and one that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
