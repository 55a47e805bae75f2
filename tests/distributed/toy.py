"""A tiny trainee with everything the loop must handle, what it should come to in plain torch, and the script that the ranks run.

    python toy.py TRAININGS.json RESULTS.json

runs a list of trainings one after another in the same ranks and writes what came of each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks, leaving
from pipeline.training import loop
from pipeline.training.loop import Stopped, Summary, train
from pipeline.training.schedules import learning_rate
from pipeline.training.settings import TrainSettings

VOCABULARY, WIDTH, LENGTH, ROWS = 40, 16, 12, 8
LOSS_WEIGHTS = {"second": 0.5}
SETTINGS = {"batch_size": ROWS, "micro_batch_size": 2, "lr": 0.02, "log_every": 1, "checkpoint_every": 1000, "warmup_ratio": 0.2}


class Model(nn.Module):
    """Tied embeddings, a buffer that training changes, matrices and vectors."""

    def __init__(self, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)
        self.recompute = False
        self.register_buffer("steps_seen", torch.zeros(1))

    def gradient_checkpointing_enable(self) -> None:
        self.recompute = True

    def hidden(self, ids: Tensor) -> Tensor:
        self.hidden_calls = getattr(self, "hidden_calls", 0) + 1
        return self.dropout(torch.relu(self.inner(self.embedding(ids))))

    def forward(self, ids: Tensor, gate: Tensor) -> Tensor:
        inner = checkpoint(self.hidden, ids, use_reentrant=False) if self.recompute else self.hidden(ids)
        return self.output(self.norm(inner * gate.to(inner.dtype)))


class Gate(nn.Module):
    """A side module: a gate on the hidden units, with an optimiser of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(WIDTH))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)  # unlike Adam, it shows a gradient of the wrong scale

    def before_step(self, step: int) -> None:
        self.step = step

    def after_step(self, step: int) -> dict[str, float]:
        assert self.step == step
        return {"gate": float(self.value.detach().sum())}


class Trainee(nn.Module):
    """Two losses over different, very unequal numbers of targets a row."""

    def __init__(self, dropout: float = 0.0, side: bool = True, bad_from: int | None = None):
        super().__init__()
        torch.manual_seed(3)
        self.model = Model(dropout)
        object.__setattr__(self, "side", Gate() if side else None)
        self.bad_from = bad_from

    def prepare(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        near = torch.where(batch["attention_mask"] == 1, (batch["input_ids"] * 3 + 1) % VOCABULARY, -100)
        return batch | {"first": near, "second": torch.where(batch["input_ids"] % 5 == 0, near, -100)}

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (batch[name] != -100).sum() for name in ("first", "second")}

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.model.steps_seen.fill_(step + 1)
        gate = self.side.value if self.side is not None else torch.ones(WIDTH)
        logits = self.model(batch["input_ids"], gate).float().flatten(0, 1)
        losses = {
            name: cross_entropy(logits, batch[name].flatten(), ignore_index=-100, reduction="sum") / (batch[name] != -100).sum().clamp(min=1)
            for name in ("first", "second")
        }
        if self.bad_from is not None and step >= self.bad_from:
            losses["second"] = losses["second"] * float("nan")
        return losses


class Table(nn.Module):
    """A side module of buffers alone, which it updates itself: a running mean of each token's hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(VOCABULARY, WIDTH))
        self.register_buffer("updates", torch.zeros(VOCABULARY, dtype=torch.int64))

    def optimizer(self) -> None:
        return None

    def before_step(self, step: int) -> None:
        self.sums = torch.zeros(VOCABULARY, WIDTH + 1)

    def collect(self, ids: Tensor, hidden: Tensor) -> None:
        self.sums.index_add_(0, ids.flatten(), nn.functional.pad(hidden.detach().float().flatten(0, 1), (0, 1), value=1.0))

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        if distributed.is_initialized():
            distributed.all_reduce(self.sums)
        means, count = self.sums[:, :-1] / self.sums[:, -1:].clamp(min=1), self.sums[:, -1]
        self.table += 0.5 * (count > 0)[:, None] * (means - self.table)
        self.updates += count.long()
        return {"norm": self.table.norm(), "updates": float(self.updates.sum())}


class Companion(nn.Module):
    """An objective with a network of its own that shares the model's embedding."""

    def __init__(self, model: Model):
        super().__init__()
        self.embedding = model.embedding
        self.network = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(self.embedding(ids))


class Accompanied(Trainee):
    """Also trains the objective's network, reads and writes a table, and counts how often a rare kind of token, 7, is predicted."""

    figures = frozenset({"hits", "kind"})
    ratios: ClassVar = {"accuracy": ("hits", "kind")}
    flops_per_row = 1e6

    def __init__(self) -> None:
        super().__init__(side=False)
        object.__setattr__(self, "side", Table())
        self.objective = Companion(self.model)

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = super().targets(batch)
        return counts | dict.fromkeys(("companion", "hits", "kind"), counts["first"])

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        ids, labels = batch["input_ids"], batch["first"].flatten()
        target = labels != -100
        logits = self.model(ids, 1 + self.side.table[ids]).float().flatten(0, 1)
        self.side.collect(ids, logits.view(*ids.shape, -1)[..., :WIDTH])
        kind = (ids.flatten() == 7) & target
        counted = {"kind": kind, "hits": kind & (logits.argmax(-1) == labels)}
        other = self.objective(ids).float().flatten(0, 1)
        return {
            "first": cross_entropy(logits, labels),
            "second": cross_entropy(logits, batch["second"].flatten(), reduction="sum") / (batch["second"] != -100).sum().clamp(min=1),
            "companion": cross_entropy(other, labels),
            **{name: found.sum() / target.sum() for name, found in counted.items()},
        }


class Batches:
    """Rows drawn from the step alone.

    actions: what to do to this process when a step's batch is asked for. pause: seconds that a batch takes to make.
    """

    batch_size, unit, steps_per_epoch = ROWS, 1, 10.0

    def __init__(self, actions: list[dict[str, Any]] = (), fingerprint: str = "toy", pause: float = 0.0):
        self.actions, self.fingerprint, self.pause = actions, fingerprint, pause

    def batch(self, step: int, rank: int, world: int) -> dict[str, np.ndarray]:
        time.sleep(self.pause)
        for action in self.actions:
            if action["step"] == step and rank in action["ranks"]:
                os.kill(os.getpid(), getattr(signal, action["signal"]))
        draw = np.random.default_rng(step)
        ids = draw.integers(0, VOCABULARY, (ROWS, LENGTH))
        lengths = np.array([LENGTH, 1, 1, 2, 1, LENGTH, 3, 1])  # the first half of the rows has fewer tokens than the second
        mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        return {"input_ids": ids[mine], "attention_mask": mask[mine]}


def reference(steps: int, *, accompanied: bool = False, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Tensor], Tensor]:
    """The same training written out in plain torch on the whole batch: losses by step, final weights, the gate or the table."""
    trainee, settings = Accompanied() if accompanied else Trainee(), TrainSettings(**SETTINGS | changes)
    matrices = [p for p in trainee.parameters() if p.ndim >= 2]
    vectors = [p for p in trainee.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if settings.optimizer == "nesterov":
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    optimizers = [optimizer] if accompanied else [optimizer, trainee.side.optimizer()]
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        trainee.side.before_step(step)
        batch = {name: torch.from_numpy(array) for name, array in Batches().batch(step, 0, 1).items()}
        losses = trainee(trainee.prepare(batch, step), step)
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
        sum(LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items() if name not in getattr(trainee, "figures", ())).backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), settings.gradient_clipping)
        for each in optimizers:
            each.step()
            each.zero_grad()
        trainee.side.after_step(step)
    return history, trainee.model.state_dict(), trainee.side.table if accompanied else trainee.side.value.detach()


def run(training: dict[str, Any]) -> tuple[Summary, int]:
    """One training as a test describes it, and how often its hidden layer was computed.

    Leaves each rank's side module, what each rank took for the time (`clock-0.json`: [step, seconds] of each learning rate), and the weights.
    """
    directory = Path(training["directory"])
    trainee = Accompanied() if training.get("accompanied") else Trainee(**training.get("trainee", {}))
    batches = Batches(training.get("actions", ()), training.get("fingerprint", "toy"), training.get("pause", 0.0))
    settings = TrainSettings(**SETTINGS | training.get("settings", {}))
    clock: list[tuple[int, float]] = []

    def observed(settings: TrainSettings, step: int, steps: int, seconds: float) -> float:
        clock.append((step, seconds))
        return learning_rate(settings, step, steps, seconds)

    loop.learning_rate = observed
    loop.telemetry.peak_flops = lambda device, precision: 1e9
    summary = train(
        trainee, batches, settings, steps=training["steps"], seed=1, directory=directory, logs=directory / "logs", ranks=Ranks.here(),
        loss_weights=LOSS_WEIGHTS, title=training["name"],
    )  # fmt: skip
    if clock:
        (directory / f"clock-{Ranks.here().rank}.json").write_text(json.dumps(clock))
    if trainee.side is not None:
        torch.save(trainee.side.state_dict(), directory / f"side-{Ranks.here().rank}.pt")
    if summary.weights is not None:
        torch.save(summary.weights, directory / "weights.pt")
    return summary, getattr(trainee.model, "hidden_calls", 0)


def main() -> None:
    trainings, results = json.loads(Path(sys.argv[1]).read_text()), {}
    for training in trainings:
        try:
            summary, calls = run(training)
            figures = {name: getattr(summary, name) for name in ("losses", "ratios", "steps", "tokens_per_second")}
            results[training["name"]] = {"outcome": "done", **figures, "calls": calls}
        except Stopped as stopped:
            results[training["name"]] = {"outcome": "stopped", "step": stopped.step, "code": stopped.code}
            if training.get("let_stop"):
                raise
        except UserError as error:
            results[training["name"]] = {"outcome": "error", "message": str(error)}
        finally:
            if Ranks.here().first:
                Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    with leaving():
        main()
