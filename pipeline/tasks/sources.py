"""What a task's examples come from. Quick: for a fingerprint, contents are hashed, never parsed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.corpus import sources
from pipeline.tasks import glue
from pipeline.tasks.settings import TaskSettings


def identity(settings: TaskSettings) -> dict[str, Any]:
    """The task's files, or the packages behind the embedded one, as JSON values.

    Raises UserError for a file that is missing or empty.
    """
    if settings.embedded:
        return {"embedded": sources.embedded_versions()}
    return {split: artifacts.file_identity(sources.checked(Path(path))) for split, path in _files(settings).items() if path is not None}


def _files(settings: TaskSettings) -> Mapping[str, str | Path | None]:
    if settings.squad:
        return {"train": settings.squad.train, "dev": settings.squad.dev}
    if settings.glue and settings.directory:
        return glue.find(settings.glue, settings.directory)[1]
    return {"train": settings.train, "dev": settings.dev, "test": settings.test}
