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

MEMORIES = {
    "tokens": 41000, "words": 10250, "characters": 51000, "bytes": 51250, "documents": 67, "development_documents": 33,
    "window": {"block": 32, "context": 96}, "within_documents": True, "long": {"size": 2048, "reset": True, "keep_duplicates": False},
    "skip_confident": None,
    "rows": [
        {
            "memory": "none", "loss": 5.5, "perplexity": 244.69, "word_perplexity": None, "bits_per_byte": 6.348, "bits_per_character": 6.379,
            "share": 0.0, "values": {}, "development_loss": 5.4, "warnings": [], "seconds": 10.0, "tokens_per_second": 4100.0,
        },
        {
            "memory": "local+long", "loss": 5.0, "perplexity": 148.41, "word_perplexity": 4.85e8, "bits_per_byte": 5.771, "bits_per_character": 5.8,
            "share": 0.25, "values": {"temperature": 4.0, "bias": 1.5}, "development_loss": 5.1,
            "warnings": ["temperature 4 is the end of its grid"], "seconds": 20.0, "tokens_per_second": 2050.0,
        },
    ],
}  # fmt: skip


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


def test_memories_have_a_table_their_values_and_their_warnings():
    report = CAUSAL | {"memories": MEMORIES}
    text = reports.markdown(report)
    assert ("memory", "nats", "perplexity", "a word", "bits per byte", "share", "tokens/s", "values") in lines(text)
    assert ("none", "5.5000", "244.69", "", "6.3480", "0.0%", "4,100", "") in lines(text)
    assert ("local+long", "5.0000", "148.41", "4.85e+08", "5.7710", "25.0%", "2,050", "temperature 4, bias 1.5") in lines(text)
    assert "Memories: 41,000 tokens (10,250 words, 51,250 bytes) of 67 held-out documents" in text
    assert "windows of 32 tokens with 96 before them, which stop where documents do; values tuned on 33 others." in text
    assert "Long memory: the last 2,048 scored places before the window, emptied where a document ends." in text
    assert "Warning, local+long: temperature 4 is the end of its grid." in text
    assert "Memories" not in reports.markdown(CAUSAL)
    figures = reports.headline(report)
    assert (figures["perplexity_none"], figures["perplexity_local_long"]) == (244.69, 148.41)


def test_the_terminal_shows_memories_and_their_values_in_a_narrow_window():
    screen = Console(file=io.StringIO(), width=100)
    screen.print(reports.table(CAUSAL | {"memories": MEMORIES}))
    shown = screen.file.getvalue()
    for figure in ("148.41", "25.0%", "2,050", "temperature 4, bias 1.5", "Warning, local+long"):
        assert figure in shown
