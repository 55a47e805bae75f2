"""The `evaluate` section of a recipe."""

from __future__ import annotations

from pipeline.settings import Settings, setting


class LatencySettings(Settings):
    batch_size: int = setting(32, "Rows a forward pass.", unit="rows", ge=1)
    length: int = setting(128, "Length of each row.", unit="tokens", ge=8)
    repeats: int = setting(30, "Timed passes of each model, taken in turn; the median counts.", unit="passes", ge=3)
    threads: int | None = setting(None, "CPU threads; default: PyTorch's.", ge=1)


class EvaluateSettings(Settings):
    batch_size: int = setting(32, "Rows a forward pass.", unit="rows", ge=1, result=False)
    max_segments: int | None = setting(None, "Held-out segments to score; default: all.", unit="segments", ge=1)
    latency: LatencySettings = setting(LatencySettings(), "How the speed of dense and pruned model is measured.")
