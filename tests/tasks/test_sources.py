from __future__ import annotations

from pipeline.tasks import sources
from pipeline.tasks.settings import TaskSettings


def test_a_tasks_identity_follows_its_files(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\n")
    task = TaskSettings(train=str(tmp_path / "train.tsv"))
    first = sources.identity(task)
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tb\n")
    assert sources.identity(task) != first
    assert "python" in sources.identity(TaskSettings(embedded=True))["embedded"]
