"""`trimline inspect`: a plan's quality, beside a random plan, and groups to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """\
name: small
runs_dir: {directory}/runs
tokenize: {{sources: [{directory}/corpus.txt], tokenizer: bytes, deduplicate: null, validation: 0}}
pack: {{length: 64, segments: within, groups: consecutive, group_size: 2}}
"""


def trimline(*arguments, check=0):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inspect")
    text = "\n\n".join(f"Document {n} is about topic{n}; whoever reads of topic{n} here reads [more] of topic{n} there." for n in range(40))
    (directory / "corpus.txt").write_text(text)
    (directory / "recipe.yaml").write_text(RECIPE.format(directory=directory))
    for stage in ("tokenize", "pack"):
        trimline(stage, directory / "recipe.yaml")
    return directory / "recipe.yaml"


def test_a_plan_is_shown_beside_a_random_one_with_groups_to_read(recipe):
    shown = trimline("inspect", recipe, "--groups", 2).stdout
    line = next(line for line in shown.splitlines() if line.startswith("BM25 inside groups"))
    ours, random = map(float, line.split()[-2:])
    assert ours > random
    assert shown.count("\nGroup ") == 2
    assert shown.count("shares: ") == 4
    assert "[more]" in shown  # the text is not taken for markup


def test_the_figures_are_the_same_from_recipe_and_directory_and_as_json(recipe):
    packed = next(recipe.parent.glob("runs/small/pack-*"))
    by_recipe, by_directory, by_plan = (json.loads(trimline("inspect", path, "--json").stdout) for path in (recipe, packed, packed / "train"))
    assert by_recipe == by_directory == by_plan
    assert by_recipe["in_group"]["same_document"] == 1
    assert by_recipe["fill_rate"] == pytest.approx(by_recipe["tokens"] / (by_recipe["tokens"] + by_recipe["padded_tokens"]))


def test_it_needs_no_torch(recipe):
    script = "import sys\nfrom pipeline.cli import main\ntry: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "inspect", str(recipe), "--json"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_mistakes_are_told(recipe, tmp_path):
    assert "no plan here" in trimline("inspect", tmp_path, check=2).stderr
    assert "does not exist; give what pack made" in trimline("inspect", tmp_path / "nothing", check=2).stderr
    assert "its plan is not made" in trimline("inspect", recipe, "pack.length=32", check=2).stderr
