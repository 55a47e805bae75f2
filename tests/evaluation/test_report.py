import io
import json

from rich.console import Console

from pipeline.evaluation import report as reports

FULL = {
    "name": "demo",
    "stages": [
        {"stage": "pack", "seconds": 1.25, "metrics": {"segments": 1234, "fill_rate": 0.987654}},
        {"stage": "prune", "seconds": 75.0, "metrics": {"realised_sparsity": 0.6011, "note": "a|b"}},
    ],
    "held_out": {"objective": "mlm", "loss": 2.0, "perplexity": 7.389, "bits_per_byte": None, "targets": 1500, "segments": 100, "of_segments": 120},
    "task": {"split": "test", "metric": "accuracy", "scores": {"fine-tuned": {"accuracy": 0.9}, "pruned": {"accuracy": 0.885}}},
    "models": {
        "pretrained": {"parameters": 3000, "encoder_parameters": 2000},
        "fine-tuned": {"parameters": 3100, "encoder_parameters": 2000},
        "pruned": {"parameters": 1900, "encoder_parameters": 800},
    },
    "latency": {
        "milliseconds": {
            "fine-tuned": {"lower_quartile": 9.0, "median": 10.0, "upper_quartile": 11.0},
            "pruned": {"lower_quartile": 3.9, "median": 4.0, "upper_quartile": 4.1},
        },
        "speed_up": {"fine-tuned": 1.0, "pruned": 2.5},
        "batch_size": 32,
        "length": 128,
        "repeats": 30,
        "device": "Processor X",
        "threads": 2,
    },
    "device": "Processor X",
    "versions": {"torch": "2.13.0"},
}
CAUSAL = FULL | {"task": None, "latency": None, "models": {"pretrained": {"parameters": 3000, "encoder_parameters": None}}}


def lines(text):
    return {tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in text.splitlines()}


def test_the_markdown_holds_every_figure_beside_its_model():
    found = lines(reports.markdown(FULL))
    assert ("pack", "1.2 s", "segments 1,234, fill rate 0.9877") in found
    assert ("prune", "1 min 15 s", "realised sparsity 0.6011, note a\\|b") in found
    assert ("", "pretrained", "fine-tuned", "pruned") in found
    assert ("accuracy (test)", "", "0.9000", "0.8850") in found
    assert ("of them in attention and feed-forward", "2,000", "2,000", "800") in found
    assert ("forward pass of 32 x 128 tokens", "", "10.0 ms", "4.0 ms") in found
    assert ("measured speed-up", "", "1.00x", "2.50x") in found
    assert "torch 2.13.0; Processor X." in reports.markdown(FULL)


def test_a_causal_report_has_bits_per_byte_and_no_task():
    text = reports.markdown(CAUSAL | {"held_out": FULL["held_out"] | {"objective": "causal", "bits_per_byte": 1.234}})
    assert ("bits per byte", "1.234") in lines(text)
    assert "accuracy" not in text
    assert "speed-up" not in text


def test_the_json_is_the_report_and_both_files_are_written(tmp_path):
    reports.write(FULL, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == FULL
    assert (tmp_path / "report.md").read_text() == reports.markdown(FULL)


def test_the_headline_names_each_models_score_and_the_speed_up():
    assert reports.headline(FULL) == {"mlm_perplexity": 7.389, "test_accuracy_finetuned": 0.9, "test_accuracy_pruned": 0.885, "speed_up": 2.5}
    assert reports.headline(CAUSAL | {"held_out": None}) == {}


def test_the_terminal_shows_the_same_results():
    screen = Console(file=io.StringIO(), width=160)
    screen.print(reports.table(FULL))
    shown = screen.file.getvalue()
    for figure in ("0.8850", "2.50x", "7.39", "1,900"):
        assert figure in shown
