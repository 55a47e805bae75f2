"""The teacher: a model, or what it said of each training row, once for all; checked against the student before anything is trained."""

from __future__ import annotations

import json
import shutil
import zipfile
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

LOGITS, SPANS, STATES = "logits.npy", "spans.npy", "states.npy"


class Recorded:
    """What a teacher says of the rows of a training split.

    logits: fp32 [rows, classes], of a black box or of `record`. spans: fp32 [tokens of all rows, 2], each token's scores as the first and as the last
    of an answer. states: fp16 [tokens of all rows, taught, width], the hidden states of layers `taught`. Tokens lie row after row as long as
    `lengths` says. None: it was not asked.
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        *,
        spans: np.ndarray | None = None,
        states: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        taught: Sequence[int] = (),
    ) -> None:
        self.taught, self._logits, self._spans, self._states = tuple(taught), logits, spans, states
        self._starts = None if lengths is None else np.cumsum(lengths) - lengths

    def outputs(self, rows: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """By the names of a model's outputs, what there is of `logits` [B, classes], `start_logits` and `end_logits` [B, L], and `hidden_states`,
        [B, L, width] each, None of layers that are not taught; 0 in padding."""
        found: dict[str, Any] = {}
        if self._logits is not None:
            found["logits"] = self._logits[rows.cpu()].to(attention_mask.device)
        if self._spans is not None:
            found["start_logits"], found["end_logits"] = self._of_tokens(self._spans, rows, attention_mask).unbind(2)
        if self._states is not None:
            states = self._of_tokens(self._states, rows, attention_mask)
            layers: list[Tensor | None] = [None] * (max(self.taught) + 2)  # the embeddings come first
            for number, layer in enumerate(self.taught):
                layers[layer + 1] = states[:, :, number]
            found["hidden_states"] = layers
        return found

    def _of_tokens(self, values: np.ndarray, rows: Tensor, attention_mask: Tensor) -> Tensor:
        """[tokens of all rows, ..] -> fp32 [B, L, ..]."""
        assert self._starts is not None
        real, starts = attention_mask.cpu().bool(), self._starts[rows.cpu().numpy()]
        places = (starts[:, None] + np.arange(real.shape[1]))[real.numpy()]
        padded = torch.zeros(*real.shape, *values.shape[1:])
        padded[real] = torch.from_numpy(values[places]).float()
        return padded.to(attention_mask.device)


def size(teacher: TrimlinePreTrainedModel, batches: TaskBatches, taught: Sequence[int]) -> int:
    """Bytes that `record` would write."""
    config: Any = teacher.config
    rows, tokens = len(batches.lengths), int(batches.lengths.sum())
    said = 4 * 2 * tokens if _of_spans(batches) else 4 * config.num_labels * rows
    return said + 2 * len(taught) * config.hidden_size * tokens


@torch.no_grad()
def record(teacher: TrimlinePreTrainedModel, batches: TaskBatches, taught: Sequence[int], directory: Path, device: torch.device) -> None:
    """Writes what `recorded` opens: logits or scores of answers, and the hidden states of layers `taught`, of each row. Whole or not at all."""
    config: Any = teacher.config
    new = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    starts, rows, tokens = np.cumsum(batches.lengths) - batches.lengths, len(batches.lengths), int(batches.lengths.sum())
    said = (SPANS, tokens, 2) if _of_spans(batches) else (LOGITS, rows, config.num_labels)
    arrays = {said[0]: np.lib.format.open_memmap(new / said[0], "w+", np.float32, said[1:])}
    if taught:
        arrays[STATES] = np.lib.format.open_memmap(new / STATES, "w+", np.float16, (tokens, len(taught), config.hidden_size))
    for numbers, output in metrics.outputs(teacher.eval().to(device), batches, device, output_hidden_states=bool(taught)):
        of_tokens = {}
        if LOGITS in arrays:
            arrays[LOGITS][numbers] = output.logits.float().cpu().numpy()
        else:
            of_tokens[SPANS] = torch.stack([output.start_logits, output.end_logits], dim=2).float().cpu().numpy()
        if taught:
            of_tokens[STATES] = torch.stack([output.hidden_states[layer + 1] for layer in taught], dim=2).half().cpu().numpy()
        for name, values in of_tokens.items():
            for row, number in enumerate(numbers):
                length = batches.lengths[number]
                arrays[name][starts[number] : starts[number] + length] = values[row, :length]
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def recorded(directory: Path, batches: TaskBatches, taught: Sequence[int]) -> Recorded:
    """What was written there of the same batches' rows."""
    spans = _of_spans(batches)
    return Recorded(
        None if spans else torch.from_numpy(np.load(directory / LOGITS)),
        spans=np.load(directory / SPANS) if spans else None,
        states=np.load(directory / STATES, mmap_mode="r") if taught else None,
        lengths=batches.lengths,
        taught=taught,
    )


def _of_spans(batches: TaskBatches) -> bool:
    """Whether the rows ask for answers, not labels."""
    return "start_positions" in batches.encoded.targets


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


def check_answers(directory: Path) -> None:
    """Raises UserError where the model there was not trained to find answers in a text: loaded for that, it has a head drawn at random."""
    architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if not any(name.endswith("ForQuestionAnswering") for name in architectures):
        raise UserError(
            f"{directory}: the student cannot learn from this teacher: it is {', '.join(architectures) or 'a model of no name'} (config.json), not"
            " one that was trained on questions; give such a one"
        )


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
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
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
