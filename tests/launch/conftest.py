from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline import recipe
from pipeline.recipe import Recipe


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads a whole chain on one small text file, in a directory of its own; keyword arguments replace sections."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n\nsome more\n")

    def load(**sections: object) -> Recipe:
        whole = {"name": "run", "tokenize": {"sources": ["text.txt"]}, "pack": {}, "pretrain": {}, "finetune": {}, "prune": {}, "evaluate": {}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({key: value for key, value in (whole | sections).items() if value is not None}))
        return recipe.load(tmp_path / "recipe.yaml")

    return load
