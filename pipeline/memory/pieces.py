"""Results of long computations kept in pieces, each file complete or absent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts


def key(*parts: Any) -> str:
    """A name for what depends on these: arrays by their bytes, anything else by its `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def kept(directory: Path | None, name: str, make: Callable[[], Mapping[str, NDArray]]) -> Mapping[str, NDArray]:
    """The arrays of `name`.npz in the directory, made and put there where they are not. Without a directory they are only made."""
    if directory is None:
        return make()
    path = directory / f"{name}.npz"
    if not path.is_file():
        arrays = make()
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        artifacts.sync(temporary)
        os.replace(temporary, path)
    with np.load(path) as loaded:
        return dict(loaded)
