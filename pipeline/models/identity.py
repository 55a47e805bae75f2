"""Which model this is, by its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import UserError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def fingerprint(directory: str | Path) -> str:
    """sha256 (64 hexadecimal digits) over the weight files of a model directory: other weights, another model; where it lies does not matter.

    Raises UserError when there are none.
    """
    files = sorted({path for pattern in WEIGHTS for path in Path(directory).glob(pattern)})
    if not files:
        raise UserError(f"{directory}: no model here (no {' or '.join(WEIGHTS)}); give a directory that save_pretrained wrote")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {artifacts.sha256(path)}\n".encode())
    return digest.hexdigest()
