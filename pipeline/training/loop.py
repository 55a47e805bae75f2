"""The training loop: one for every stage, stage of ZeRO and number of ranks.

What the optimiser sees does not depend on how rows are divided. With n the targets of a named loss in a micro-batch and N in
the global batch, a micro-batch's mean loss enters with weight n / N, so the sum over micro-batches and ranks is the mean over
all targets; a mean of means would not be, where rows have unequal numbers of targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn

from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.training import engine as engines
from pipeline.training import telemetry
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.deepspeed_config import division, render
from pipeline.training.schedules import learning_rate
from pipeline.training.settings import TrainSettings
from pipeline.training.signals import Stopped, StopRequest, stop_requests

__all__ = ["Batches", "Stopped", "Summary", "Watch", "train"]

Watch = Callable[[int, Callable[[], dict[str, Tensor] | None]], None]
"""What a caller does while it trains: given the number of steps done, and how to ask for the weights as in `Summary`, which all ranks do alike."""


class Batches(Protocol):
    """What the loop trains on; see DESIGN.md."""

    batch_size: int
    unit: int
    fingerprint: str

    def batch(self, step: int, rank: int, world: int) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Summary:
    """What came out of a training.

    losses: global means of the last step, by name. ratios: the trainee's quotients of them. seconds: in training steps, over all restarts.
    tokens_per_second: tokens that are not padding, all ranks. steps: those done, fewer than asked for where the time budget ended training.
    weights: on rank 0 the full fp32 state dict of `trainee.model`; None on the others.
    """

    losses: dict[str, float]
    ratios: dict[str, float]
    seconds: float
    tokens_per_second: float
    steps: int
    weights: dict[str, Tensor] | None = field(repr=False)


def train(
    trainee: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    *,
    steps: int,
    seed: int,
    directory: Path,
    logs: Path,
    ranks: Ranks,
    loss_weights: dict[str, float] | None = None,
    title: str = "pretrain",
    watch: Watch | None = None,
) -> Summary:
    """Trains for `steps` optimiser steps, or until the settings' time budget is used up. Every rank calls it.

    Goes on from `directory/checkpoints` where there are any. The clock of the time budget is the first rank's, as it was when the step before began.
    watch: called after each step, on every rank, before a checkpoint of it is saved; steps that are done again after a restart are watched again.
    Its time does not count as training.
    The trainee's losses must be 0, not nan, in a batch without targets. A finished training returns its summary at once.
    Raises Stopped after SIGTERM, SIGINT or SIGUSR2, with a checkpoint saved; UserError when the batch cannot be divided among
    the ranks, the checkpoints do not fit, or a loss is no longer finite.
    """
    if ranks.size > 1 and ranks.by != "torch":
        raise UserError(f"{title}: {ranks.size} ranks were started by {ranks.by}; start them with the deepspeed launcher or with srun")
    with stop_requests() as stop:
        loop = _Loop(trainee, batches, settings, steps, seed, directory, logs, ranks, loss_weights or {}, title, watch)
        try:
            return loop.run(stop)
        finally:
            loop.close()


@dataclass
class _Loop:
    trainee: Any
    batches: Batches
    settings: TrainSettings
    steps: int
    seed: int
    directory: Path
    logs: Path
    ranks: Ranks
    loss_weights: dict[str, float]
    title: str
    watch: Watch | None

    def __post_init__(self) -> None:
        trainee, batches, ranks = self.trainee, self.batches, self.ranks
        settings = self.settings.model_copy(update={"batch_size": batches.batch_size})
        self.rows, self.accumulation = division(batches.batch_size, batches.unit, settings.micro_batch_size, ranks.size)
        config = render(settings.deepspeed, settings, rows=self.rows, world=ranks.size)
        self.device = engines.start()
        assert distributed.get_world_size() == ranks.size, f"{distributed.get_world_size()} ranks joined, {ranks.size} expected"
        self.figures: frozenset[str] = getattr(trainee, "figures", frozenset())
        self.ratios: Mapping[str, tuple[str, str]] = getattr(trainee, "ratios", {})
        self.side = _outside(trainee, self.device)
        self.side_optimizer = self.side.optimizer() if self.side is not None else None
        if settings.activation_checkpointing:
            engines.recompute_activations(trainee)
        trainee.train()
        self.engine = engines.build(trainee, config, settings)

        precision = engines.precision(config)
        identity = {"data": batches.fingerprint, "ZeRO stage": engines.zero_stage(self.engine), "precision": precision}
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints", self.engine, self.side, self.side_optimizer, identity, settings.keep_checkpoints
        )
        self.done, self.progress = self.checkpoints.restore() or (0, {"losses": {}, "seconds": 0.0, "tokens": 0})
        if self.done > self.steps:
            raise UserError(
                f"{self.directory}: trained for {self.done} steps already, {self.steps} are asked for; remove {self.directory} to train again"
            )
        self.elapsed = self.progress["seconds"]
        self.telemetry = None
        if ranks.first:
            self.telemetry = telemetry.Telemetry(
                self.logs, title=self.title, start=self.done, steps=self.steps, time_budget=settings.time_budget, ratios=self.ratios
            )
        if self.done and ranks.first:
            print(f"{self.title}: goes on after step {self.done}", flush=True)
        peak, flops = telemetry.peak_flops(self.device, precision), getattr(trainee, "flops_per_row", None)
        self.mfu_per_row = flops / (peak * ranks.size) if peak and flops else None  # times full rows a second
        self.names: list[str] = []
        self.pending: list[tuple[dict[str, Any], Tensor]] = []

    def run(self, stop: StopRequest) -> Summary:
        self.clock = time.perf_counter()
        while not self._finished():
            observed = self._step(self.done, stop)
            self.done += 1
            microseconds, asked = observed()
            self.elapsed = microseconds / 1e6
            if self.watch is not None:
                before = time.perf_counter()
                self.watch(self.done, lambda: engines.full_weights(self.engine, self.trainee.model))
                self.clock += time.perf_counter() - before
            log = self._finished() or self.done % self.settings.log_every == 0
            save = asked or self._finished() or self.done % self.settings.checkpoint_every == 0
            if save or log:
                self._flush(rates=log)
            if save:
                self.checkpoints.save(self.done, self.progress)
                self.clock = time.perf_counter()
            if asked:
                if self.ranks.first:
                    print(f"{self.title}: stopped after step {self.done} by {stop.signal_name or 'another rank'}, checkpoint saved", flush=True)
                raise Stopped(self.done, stop.signal_name or "another rank")
        losses, seconds, tokens = self.progress["losses"], self.progress["seconds"], self.progress["tokens"]
        weights = engines.full_weights(self.engine, self.trainee.model)
        return Summary(losses, telemetry.quotients(self.ratios, losses), seconds, tokens / max(seconds, 1e-9), self.done, weights)

    def _finished(self) -> bool:
        budget = self.settings.time_budget
        return self.done == self.steps or (budget is not None and self.elapsed >= 60 * budget)

    def _step(self, step: int, stop: StopRequest) -> Callable[[], list[int]]:
        """One optimiser step. Returns how to ask for the first rank's clock when it began (microseconds of training) and for how many ranks
        were asked to stop, without waiting for the device now.
        """
        lr = learning_rate(self.settings, step, self.steps, self.elapsed)
        engines.set_learning_rate(self.engine, lr)
        torch.manual_seed(int(np.random.SeedSequence([self.seed, step, self.ranks.rank]).generate_state(1, np.uint64)[0]))
        if self.side is not None:
            self.side.before_step(step)
        micro_batches, counts, totals = self._batch(step, stop)
        observed = _later(totals[-2:])  # queued before the step's work, so that asking does not wait for it
        shares = counts / totals[: len(self.names)].clamp(min=1)  # [micro-batches, losses]
        means = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            losses = self.engine(batch, step)
            assert sorted(losses) == self.names, f"losses {sorted(losses)}, targets {self.names}"
            stacked = torch.stack([losses[name].float() for name in self.names])
            means += stacked.detach() * shares[index]
            share = (self.weights * shares[index] * self.ranks.size).float()  # DeepSpeed divides gradients by the number of ranks
            self.engine.backward((stacked * share).sum(), scale_wrt_gas=False)
            if index + 1 < self.accumulation:
                self.engine.step()
        norm = engines.step(self.engine)
        record = {"step": step + 1, "lr": lr, "side": self._step_side(step)}
        self.pending.append((record, torch.cat([means, norm.reshape(1), totals[-3:-2].double()])))
        return observed

    def _batch(self, step: int, stop: StopRequest) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
        """This rank's prepared micro-batches, their targets [micro-batches, losses], and over all ranks
        the targets of each loss, the tokens that are not padding, the first rank's clock, and how many ranks were asked to stop: int64 [losses + 3].
        """
        arrays = self.batches.batch(step, self.ranks.rank, self.ranks.size)
        found = {len(array) for array in arrays.values()}
        assert found == {self.rows * self.accumulation}, f"batch of {found} rows, expected {self.rows * self.accumulation}"
        tokens, self.row_length = arrays["attention_mask"].sum(), arrays["attention_mask"].shape[1]
        micro_batches = []
        for start in range(0, self.rows * self.accumulation, self.rows):
            batch = {name: _to(array[start : start + self.rows], self.device) for name, array in arrays.items()}
            micro_batches.append(self.trainee.prepare(batch, step))
        targets = [self.trainee.targets(batch) for batch in micro_batches]
        if not self.names:
            self.names = sorted(targets[0])
            trained = [name for name in self.names if name not in self.figures]
            unknown = sorted(set(self.loss_weights) - set(trained))
            if unknown:
                raise UserError(f"loss_weights: no loss is called {', '.join(unknown)}; the losses here are {', '.join(trained)}")
            self.loss_weights = dict.fromkeys(self.names, 0.0) | dict.fromkeys(trained, 1.0) | self.loss_weights
            self.weights = torch.tensor([self.loss_weights[name] for name in self.names], device=self.device)
        counts = torch.stack([torch.stack([found[name].to(self.device, torch.int64) for name in self.names]) for found in targets])
        seconds = self.progress["seconds"] + time.perf_counter() - self.clock if self.ranks.first else 0.0
        totals = torch.cat([counts.sum(0), _to(np.array([tokens, int(1e6 * seconds), bool(stop)], dtype=np.int64), self.device)])
        distributed.all_reduce(totals)
        return micro_batches, counts, totals

    def _step_side(self, step: int) -> dict[str, float | Tensor]:
        """Averages the side module's gradients over ranks, where it has any, and steps it."""
        if self.side is None:
            return {}
        gradients = [parameter.grad for parameter in self.side.parameters() if parameter.grad is not None]
        if gradients:
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            distributed.all_reduce(flat)
            flat /= self.ranks.size
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        if self.side_optimizer is not None:
            self.side_optimizer.step()
        values = self.side.after_step(step)
        self.side.zero_grad(set_to_none=True)
        return values

    def _flush(self, rates: bool) -> None:
        """Brings the pending steps' figures to the host, checks that they are finite, and writes them down."""
        count = len(self.names)
        figures = torch.stack([row for _, row in self.pending])  # [steps, losses | gradient norm | tokens]
        means = figures[:, :count].contiguous()
        distributed.all_reduce(means)
        values, rest = means.tolist(), figures[:, count:].tolist()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        records: list[dict[str, Any]] = []
        for (record, _), losses, (norm, _) in zip(self.pending, values, rest, strict=True):
            by_name = dict(zip(self.names, losses, strict=True))
            total = sum(self.loss_weights[name] * loss for name, loss in by_name.items())
            self._check_finite(record, by_name, norm)
            made = {"loss": total, "losses": by_name, "ratios": telemetry.quotients(self.ratios, by_name), "lr": record["lr"], "grad_norm": norm}
            records.append({"step": record["step"], **made, "side": {name: float(value) for name, value in record["side"].items()}})
        tokens = round(sum(tokens for _, tokens in rest))
        if rates:
            records[-1] |= {
                "seconds": self.progress["seconds"] + seconds,
                "tokens_per_second": tokens / seconds,
                "rows_per_second": self.batches.batch_size * len(records) / seconds,
                "memory_bytes": telemetry.memory_bytes(self.device),
                "mfu": tokens / self.row_length / seconds * self.mfu_per_row if self.mfu_per_row else None,
            }
        self.pending.clear()
        self.progress = {
            "losses": records[-1]["losses"],
            "seconds": self.progress["seconds"] + seconds,
            "tokens": self.progress["tokens"] + tokens,
        }
        if self.telemetry is not None:
            self.telemetry.record(records)

    def _check_finite(self, record: dict[str, Any], losses: dict[str, float], norm: float) -> None:
        bad = [f"loss {name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not bad and not math.isfinite(norm):
            bad = [f"the gradient norm is {norm}"]
        if bad:
            raise UserError(
                f"{self.title}: step {record['step']}: {', '.join(bad)} (learning rate {record['lr']:.2e}, gradient norm {norm:.3g}); "
                f"the last checkpoint in {self.checkpoints.directory} is from before it. "
                f"Try a lower lr, a longer warmup_ratio, a smaller gradient_clipping, or a DeepSpeed configuration in fp32"
            )

    def close(self) -> None:
        if self.telemetry is not None:
            self.telemetry.close()
        engines.close(self.engine)


def _outside(trainee: Any, device: torch.device) -> Any:
    """The trainee's side module, kept from DeepSpeed (which would cast, shard and step it), the same on every rank."""
    side = trainee.side
    if side is None:
        return None
    inside = {id(parameter) for parameter in trainee.parameters()}
    assert not any(id(parameter) in inside for parameter in side.parameters()), "the side module is also a part of the trainee"
    side.to(device)
    with torch.no_grad():
        for tensor in (*side.parameters(), *side.buffers()):
            distributed.broadcast(tensor, src=0)
    return side


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _later(values: Tensor) -> Callable[[], list[int]]:
    """Starts bringing a few numbers to the host; the call reads them. Waits for that copy alone, not for what was queued after it."""
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return copy.tolist()

    return read
