import json

import pytest
import torch
from matplotlib.colors import to_rgba
from rich.console import Console

from pipeline.compression.pictures import GONE, KEPT, Point, structure_figure, trade_off_figure
from pipeline.compression.sparsity import Prunable
from pipeline.compression.structure import Death, deaths, numbers, runs, structure, table
from pipeline.compression.surgery import remove

MODEL = Prunable(layers=3, hidden=32, heads=4, ffn=48)


def masks_of_all():
    masks = {unit: torch.ones(shape) for unit, shape in MODEL.shapes.items()}
    masks["heads"][0, 2], masks["heads"][2] = 0, torch.tensor([0.3, 0, 0, 0.9])
    masks["neurons"][1, 10:], masks["neurons"][0, 5] = 0, 0
    masks["attention"][1], masks["feedforward"][2] = 0, 0
    masks["hidden"][[0, 7]] = 0
    return masks


def test_a_structure_says_what_stays_of_all_five_units():
    found = json.loads(json.dumps(structure(masks_of_all(), MODEL)))
    assert [(row["layer"], row["heads"], row["which_heads"], row["neurons"], row["which_neurons"]) for row in found["layers"]] == [
        (1, 3, "0-1,3", 47, "0-4,6-47"),
        (2, 0, "", 10, "0-9"),
        (3, 2, "0,3", 0, ""),
    ]
    assert {(row["of_heads"], row["of_neurons"]) for row in found["layers"]} == {(4, 48)}
    assert (found["dimensions"], found["of_dimensions"], found["which_dimensions"]) == (30, 32, "1-6,8-31")


def test_a_structure_is_the_removed_models(encoder):
    masks = masks_of_all()
    removed, found = remove(encoder(), masks).config, structure(masks, MODEL)
    assert [row["heads"] for row in found["layers"]] == removed.heads_per_layer
    assert [row["neurons"] for row in found["layers"]] == removed.ffn_per_layer
    assert [numbers(row["which_heads"]) or None for row in found["layers"]] == removed.heads_kept
    assert found["dimensions"] == removed.hidden_size


def test_without_masks_all_is_left():
    found = structure({}, MODEL)
    assert {(row["which_heads"], row["which_neurons"]) for row in found["layers"]} == {("0-3", "0-47")}


@pytest.mark.parametrize("written", ["", "0", "3-5", "0-5,8", "1,3,5-6,9"])
def test_runs_are_read_as_they_were_written(written):
    assert runs(numbers(written)) == written


def test_the_table_shows_heads_bars_and_dimensions():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(structure(masks_of_all(), MODEL)))
    lines = capture.get().splitlines()
    assert [line for line in lines if "x..x" in line and "2 of 4" in line and "0 of 48" in line and "#" not in line]
    assert [line for line in lines if "xx.x" in line and "47 of 48" in line and "#" * 24 in line]
    assert "30 of 32 dimensions" in capture.get()
    order = [line.split()[1] for line in lines if " of 48" in line]
    assert order == ["3", "2", "1"]


def test_the_picture_has_a_square_a_head_and_a_bar_of_neurons():
    figure = structure_figure(structure(masks_of_all(), MODEL))
    heads, neurons = figure.axes
    colours = [patch.get_facecolor() for patch in heads.patches]
    assert [colours.count(to_rgba(colour)) for colour in (KEPT, GONE)] == [5, 7]
    widths = [patch.get_width() for patch in neurons.patches if patch.get_facecolor() == to_rgba(KEPT)]
    assert widths == pytest.approx([47 / 48, 10 / 48, 0])
    assert figure.get_suptitle() == "30 of 32 dimensions"


def test_the_trade_off_has_a_line_a_method_and_the_teachers():
    points = [Point("cofi", "95 %", 10.0, 82.0), Point("cofi", "60 %", 2.0, 86.0), Point("one-shot", "95 %", 8.0, 83.0)]
    figure = trade_off_figure(points, metric="accuracy", teacher=90.0)
    cofi, one_shot, *teacher = figure.axes[0].lines
    assert (list(cofi.get_xdata()), list(cofi.get_ydata())) == ([2.0, 10.0], [86.0, 82.0])
    assert one_shot.get_label() == "one-shot"
    assert [line.get_ydata()[0] for line in teacher] == [90.0, 81.0]


@pytest.mark.parametrize("speed_up", [0.8, 1.1, 1.82, 2.5, 7.0, 17.5, 25.0, 40.0, 85.0])
def test_one_model_alone_has_a_number_beside_it(speed_up):
    (panel,) = trade_off_figure([Point("cofi", "", speed_up, 0.55)], metric="accuracy", teacher=0.54).axes
    left, right = panel.get_xlim()
    assert left < speed_up < right
    assert any(left <= tick <= right for tick in panel.get_xticks())


def test_pictures_are_drawn(tmp_path):
    for name, figure in (
        ("structure", structure_figure(structure(masks_of_all(), MODEL), "a title")),
        ("trade-off", trade_off_figure([Point("cofi", "95 %", 10.0, 0.8)], metric="accuracy")),
    ):
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_layers_that_died_first_come_first_and_those_that_came_back_do_not_count():
    def record(step, attention, feedforward):
        alive = {f"attention_alive_{layer}": float(lives) for layer, lives in enumerate(attention, start=1)}
        alive |= {f"feedforward_alive_{layer}": float(lives) for layer, lives in enumerate(feedforward, start=1)}
        return {"step": step, "side": {**alive, "attention_alive": float(sum(attention)), "lambda_1": -1.0}}

    records = [
        record(10, (1, 1, 1), (1, 1, 1)),
        record(20, (1, 0, 1), (1, 0, 0)),
        record(30, (1, 1, 1), (1, 0, 1)),
        record(40, (0, 1, 1), (1, 0, 1)),
        record(50, (0, 1, 1), (1, 0, 0)),
    ]
    assert deaths(records) == [Death(20, "feedforward", 2), Death(40, "attention", 1), Death(50, "feedforward", 3)]
    assert deaths(records[:1]) == []
