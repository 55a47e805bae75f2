"""The teacher: a model, or what a black box said of each training example; checked against the student before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError


def check(teacher: Any, student: Any, labels: Sequence[str] | None, *, layers: bool) -> None:
    """Raises UserError for a teacher that cannot be learnt from: of other labels, or another order of them, of another vocabulary, or, where
    `layers` are learnt, of another width.

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
