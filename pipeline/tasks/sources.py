"""What a task's examples come from. Quick: for a fingerprint, contents are hashed, never parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.corpus import sources
from pipeline.tasks.settings import TaskSettings


def identity(settings: TaskSettings) -> dict[str, Any]:
    """The task's files, or the packages behind the embedded one, as JSON values.

    Raises UserError for a file that is missing or empty.
    """
    if settings.embedded:
        return {"embedded": sources.embedded_versions()}
    splits = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    return {split: artifacts.file_identity(sources.checked(Path(path))) for split, path in splits.items() if path is not None}
