from __future__ import annotations

import pytest

from pipeline.tasks import sources
from pipeline.tasks.settings import TaskSettings


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        (["train.tsv"], lambda place: {"train": f"{place}/train.tsv"}),
        (["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"], lambda place: {"glue": "MNLI", "directory": str(place)}),
        (["train.json", "dev.json.gz"], lambda place: {"squad": {"train": f"{place}/train.json", "dev": f"{place}/dev.json.gz"}}),
    ],
)
def test_a_tasks_identity_follows_each_of_its_files(tmp_path, files, settings):
    for name in files:
        (tmp_path / name).write_text(name)
    task = TaskSettings(**settings(tmp_path))
    found = [sources.identity(task)]
    assert len(found[0]) == len(files)
    for name in files:
        (tmp_path / name).write_text("other")
        found.append(sources.identity(task))
    assert len({str(identity) for identity in found}) == len(files) + 1


def test_the_embedded_tasks_identity_is_its_packages(tmp_path):
    assert "python" in sources.identity(TaskSettings(embedded=True))["embedded"]
