"""The teacher: a model, or what it said of each training row, once for all; checked against the student before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlinePreTrainedModel
from pipeline.tasks import metrics
from pipeline.tasks.batches import TaskBatches

LOGITS, STATES = "logits.npy", "states.npy"


class Recorded:
    """What a teacher says of the rows of a training split.

    logits: fp32 [rows, classes], of a black box or of `record`. states: fp16 [tokens of all rows, taught, width], the hidden states of layers
    `taught`, row after row as long as `lengths` says; None: outputs alone.
    """

    def __init__(self, logits: Tensor, states: np.ndarray | None = None, lengths: np.ndarray | None = None, taught: Sequence[int] = ()):
        self.logits, self.taught, self._states = logits, tuple(taught), states
        self._starts = None if lengths is None else np.cumsum(lengths) - lengths

    def outputs(self, rows: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """`logits` [B, classes]; `hidden_states` as a model has them, [B, L, width] each with 0 in padding, None where they were not recorded."""
        device, found = attention_mask.device, {"logits": self.logits[rows.cpu()].to(attention_mask.device)}
        if self._states is None or self._starts is None:
            return found
        real, starts = attention_mask.cpu().bool(), self._starts[rows.cpu().numpy()]
        places = (starts[:, None] + np.arange(real.shape[1]))[real.numpy()]
        states = torch.zeros(*real.shape, *self._states.shape[1:])
        states[real] = torch.from_numpy(self._states[places]).float()
        states = states.to(device)
        layers: list[Tensor | None] = [None] * (max(self.taught) + 2)  # the embeddings come first
        for number, layer in enumerate(self.taught):
            layers[layer + 1] = states[:, :, number]
        return {**found, "hidden_states": layers}


def size(teacher: TrimlinePreTrainedModel, batches: TaskBatches, taught: Sequence[int]) -> int:
    """Bytes that `record` would write."""
    config: Any = teacher.config
    return int(4 * len(batches.lengths) * config.num_labels + 2 * batches.lengths.sum() * len(taught) * config.hidden_size)


@torch.no_grad()
def record(teacher: TrimlinePreTrainedModel, batches: TaskBatches, taught: Sequence[int], directory: Path, device: torch.device) -> None:
    """Writes what `recorded` opens: the logits, and the hidden states of layers `taught`, of each row. Whole or not at all."""
    config: Any = teacher.config
    new = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    starts, tokens = np.cumsum(batches.lengths) - batches.lengths, int(batches.lengths.sum())
    logits = np.lib.format.open_memmap(new / LOGITS, "w+", np.float32, (len(starts), config.num_labels))
    states = np.lib.format.open_memmap(new / STATES, "w+", np.float16, (tokens, len(taught), config.hidden_size)) if taught else None
    for numbers, output in metrics.outputs(teacher.eval().to(device), batches, device, output_hidden_states=bool(taught)):
        logits[numbers] = output.logits.float().cpu().numpy()
        if states is not None:
            layers = torch.stack([output.hidden_states[layer + 1] for layer in taught], dim=2).half().cpu().numpy()
            for row, number in enumerate(numbers):
                length = batches.lengths[number]
                states[starts[number] : starts[number] + length] = layers[row, :length]
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def recorded(directory: Path, batches: TaskBatches, taught: Sequence[int]) -> Recorded:
    """What was written there of the same batches' rows."""
    states = np.load(directory / STATES, mmap_mode="r") if taught else None
    return Recorded(torch.from_numpy(np.load(directory / LOGITS)), states, batches.lengths, taught)


def check(teacher: Any, student: Any, labels: Sequence[str] | None, *, layers: bool, heads: bool) -> None:
    """Raises UserError for a teacher that cannot be learnt from: of other labels, or another order of them, of another vocabulary, or, where
    `layers` are learnt, of another width, where `heads` are, of other heads.

    labels: of the task, in order; none in a regression; None where it has none, as answers that are spans.
    """
    ours, theirs = student.config, teacher.config
    found = None
    if labels is not None:
        wanted = list(labels) or ["a number"]
        names = [theirs.id2label[number] for number in range(theirs.num_labels)] if labels or theirs.num_labels > 1 else wanted
        if names != wanted:
            found = f"its labels are {', '.join(names)}, the task's {', '.join(wanted)}, in this order"
    if found is None and theirs.vocab_size != ours.vocab_size:
        found = f"it knows {theirs.vocab_size} tokens, the student {ours.vocab_size}"
    if found is None and layers and theirs.hidden_size != ours.hidden_size:
        found = f"its hidden states have {theirs.hidden_size} dimensions, the student's {ours.hidden_size}; set distillation.layers: 0, or"
        found += " give one of the same width"
    if found is None and heads and theirs.heads_per_layer != ours.heads_per_layer:
        found = f"its layers have {theirs.heads_per_layer} heads, the student's before pruning {ours.heads_per_layer}; set distillation.attention: 0"
    if found is not None:
        raise UserError(f"{theirs.name_or_path}: the student cannot learn from this teacher: {found}")


def outputs(path: str | Path, examples: int, labels: int) -> Tensor:
    """A black box's logits: fp32 [examples, labels], of `.npz` with an array `logits`, or `.jsonl` with an object of `logits` a line.

    Raises UserError where these are not as many as the training split has examples and the task has labels, or are no finite numbers.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = np.asarray(arrays["logits"], dtype=np.float32)
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            found = np.array([json.loads(line)["logits"] for line in lines], dtype=np.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "an array `logits`" if path.suffix == ".npz" else 'a line {"logits": [..]} for each example'
        raise UserError(f"{path}: not a teacher's outputs ({error!r}); expected {what}") from None
    if found.shape != (examples, labels):
        raise UserError(
            f"{path}: logits of shape {list(found.shape)}, expected [{examples}, {labels}]: one row for each training example in the order of"
            " finetune's task.json (after what max_train and dev_fraction leave), one number for each label"
        )
    if not np.isfinite(found).all():
        raise UserError(f"{path}: row {int((~np.isfinite(found)).any(1).argmax()) + 1} has a logit that is not finite")
    return torch.from_numpy(found)
