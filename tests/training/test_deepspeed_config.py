from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.shipped import shipped
from pipeline.training.deepspeed_config import division, render
from pipeline.training.settings import TrainSettings

SHIPPED = sorted(path.stem for path in shipped("ds_configs").glob("*.json"))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.json"
    path.write_text(text)
    return str(path)


def test_the_shipped_configurations_are_the_stages_in_fp32_and_bf16():
    stages = ["zero0", "zero1", "zero2", "zero3", "zero3-offload"]
    assert sorted([*stages, *(f"{stage}-bf16" for stage in stages)]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_numbers_come_from_the_recipe(name):
    settings = TrainSettings(batch_size=48, micro_batch_size=8, gradient_clipping=0.0)
    config = render(name, settings, rows=8, world=2)
    assert config["train_batch_size"] == 48
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.0
    assert '"auto"' not in json.dumps(config)


def test_clipping_is_set_where_the_file_does_not_mention_it(tmp_path):
    config = render(written(tmp_path, '{"zero_optimization": {"stage": 1}}'), TrainSettings(gradient_clipping=0.0), rows=32, world=1)
    assert config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "gradient_clipp1ng": "auto"\n}', r"mine\.json:2: unknown key 'gradient_clipp1ng'; did you mean 'gradient_clipping'\?"),
        ('{"train_batch_size": 64}', r"mine\.json:1: train_batch_size is 64 here, and batch_size of the recipe says it too"),
        ('{\n\n"optimizer": {"type": "Adam"}}', r"mine\.json:3: optimizer cannot be set here: the recipe's lr"),
        ('{"fp16": {"enabled": true}}', r"mine\.json:1: fp16 cannot be set here: .* use bf16"),
        ('{\n"bf16": {},\n}', r"mine\.json:3: not JSON"),
        ("[1]", r"mine\.json: a DeepSpeed configuration is a JSON object, found list"),
        ('{"bf16": {}, "bf16": {}}', r"mine\.json:1: bf16 is given twice"),
    ],
)
def test_mistakes_in_the_file_name_the_place_and_the_remedy(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        render(written(tmp_path, text), TrainSettings(), rows=32, world=1)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match=r"zero9: No such file or directory; .* zero0, zero0-bf16, zero1"):
        render("zero9", TrainSettings(), rows=32, world=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((48, 2, 8, 2), (8, 3)), ((32, 1, 32, 1), (32, 1)), ((32, 4, 7, 2), (4, 4)), ((10, 1, 4, 1), (2, 5)), ((64, 1, 16, 4), (16, 1))],
)
def test_division(arguments, expected):
    assert division(*arguments) == expected


@given(st.integers(1, 500), st.integers(1, 4), st.integers(1, 64), st.integers(1, 8))
def test_a_division_is_exact_and_the_coarsest(batch_size, unit, micro_batch_size, world):
    try:
        rows, accumulation = division(batch_size, unit, micro_batch_size, world)
    except UserError:
        assert batch_size % (unit * world) or micro_batch_size < unit
        return
    assert rows * accumulation * world == batch_size
    assert rows % unit == 0
    assert rows <= micro_batch_size
    share = batch_size // world
    assert not any(share % fewer == 0 and share // fewer % unit == 0 and share // fewer <= micro_batch_size for fewer in range(1, accumulation))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 1, 8, 4), "batch_size 3 is too small for 4 ranks: set batch_size to 4 or more, or use at most 3 ranks"),
        ((6, 4, 8, 2), r"too small for 2 ranks \(rows stay together in units of 4\): set batch_size to 8 or more, or use at most 1 ranks"),
        ((50, 4, 8, 2), r"not a multiple of ranks \(2\) times the rows that stay together \(4\): 48 or 56 would do"),
        ((16, 4, 2, 1), "micro_batch_size 2 cannot hold the 4 rows"),
    ],
)
def test_a_batch_that_cannot_be_divided_says_what_would_do(arguments, message):
    with pytest.raises(UserError, match=message):
        division(*arguments)


def test_checking_a_configuration_loads_neither_torch_nor_deepspeed():
    code = "import sys, pipeline.training.deepspeed_config; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=shipped("ds_configs").parent).returncode == 0
