"""`trimline generate`: from a model directory or a recipe to text."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import artifacts, generate
from pipeline.errors import UserError
from pipeline.memory.kinds import Memory
from pipeline.memory.sampling import Sampling
from tests.memory.stores import Made, word_tokenizer
from tests.test_cli import trimline

PROMPT = " ".join(f"w{n}" for n in range(10, 50))
"""Longer than the model's window of 32 tokens."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A decoder, its tokenizer beside it, and a datastore of its texts."""
    found = Made(tmp_path_factory.mktemp("made"))
    found.tokenizer.save_pretrained(found.model_directory)
    return found


def written(source, memory="none", prompt=PROMPT, tokens=12, **sampling):
    pieces, said = generate.text(source, prompt, memory, Sampling(**sampling), tokens=tokens)
    return "".join(pieces), said


@pytest.mark.parametrize("memory", ["none", "local+long", "local+long+external", "knn+cache+long"])
def test_any_memory_writes_the_same_text_for_the_same_seed(made, memory):
    source = generate.find(made.model_directory, []).with_options(made.directory, None, None)
    text, said = written(source, memory, seed=4)
    assert text == written(source, memory, seed=4)[0] != written(source, memory, seed=5)[0]
    assert set(text.split()) <= set(made.tokenizer.get_vocab())
    assert f"memory {memory}" in said
    assert ("not tuned for this model" in said) == (memory != "none")


def test_text_arrives_in_pieces_that_together_continue_the_prompt(made):
    pieces, _ = generate.text(generate.find(made.model_directory, []), "w10 w11", "none", Sampling(), tokens=5)
    pieces = list(pieces)
    assert len(pieces) >= 4
    assert pieces[0].startswith(" w")


def test_a_model_of_hugging_face_writes_with_memory(made, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    text, said = written(generate.find(tmp_path, []), "local+long")
    assert len(text.split()) == 12
    assert "window of 16 tokens" in said
    assert "window of 9 tokens" in written(generate.find(tmp_path, []).with_options(None, 9, None))[1]


def test_without_a_prompt_a_text_begins_anew(made):
    assert written(generate.find(made.model_directory, []), prompt="")[0]


def test_mistakes_are_told(made, tmp_path):
    source = generate.find(made.model_directory, [])
    for memory, message in (("lokal", "--memory: no memory is called 'lokal'"), ("knn", "--memory knn looks up a datastore: give --datastore DIR")):
        with pytest.raises(UserError, match=message):
            written(source, memory)
    with pytest.raises(UserError, match="no settings to override"):
        generate.find(made.model_directory, ["pretrain.steps=2"])
    other = Made(tmp_path, documents=5, words=61)
    with pytest.raises(UserError, match="made with model"):
        written(source.with_options(other.directory, None, None), "external")


def test_values_are_those_of_the_last_evaluation_of_this_very_model(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "corpus.txt").write_text("A document.\n\nAnother one.")
    recipe.write_text(
        f"name: r\nruns_dir: {tmp_path}\nmodel: {{kind: decoder, max_length: 32}}\ntokenize: {{sources: ['{tmp_path}/corpus.txt']}}\n"
        "pack: {length: 16}\npretrain: {objective: {name: causal}}\nindex: {}\nevaluate: {memory: [local+external]}\n"
    )
    with pytest.raises(UserError, match="pretrain is not made"):
        generate.find(recipe, [])
    from pipeline import recipe as recipes
    from pipeline import workflow

    def publish(stage, content, **inputs):
        step = next(step for step in workflow.resolve(recipes.load(recipe)) if step.stage == stage)
        partial = tmp_path / "r" / f"{step.name}.partial"
        partial.mkdir(parents=True)
        (partial / "report.json").write_text(json.dumps(content))
        artifacts.publish(partial, stage=stage, digest=step.fingerprint, settings=step.settings, inputs=step.inputs | inputs, metrics={}, started=0.0)

    publish("tokenize", {})
    publish("pretrain", {})
    usual = {"temperature": 1.0, "store_temperature": 1.0, "store_bias": 0.0, "neighbours": 1024}
    source = generate.find(recipe, [])
    assert source.window == (8, 8)
    assert generate.values(Memory.of("local+external"), source) == (Memory.of("local+external"), usual, "not tuned for this model")
    tuned = usual | {"temperature": 1.15, "knn_weight": 0.3, "knn_temperature": 0.5}
    rows = [{"memory": "local+external", "values": usual}, {"memory": "local+external, interpolated", "values": tuned}]
    publish("evaluate", {"memories": {"rows": rows}})
    memory, values, whence = generate.values(Memory.of("external+local"), generate.find(recipe, []))
    assert (memory.rule, values, whence) == ("interpolated", tuned, "as the last evaluation tuned them")
    recipe.write_text(recipe.read_text().replace("name: causal}", "name: causal}, steps: 7"))
    publish("pretrain", {})
    assert generate.find(recipe, []).evaluation is None


def test_the_command_prints_the_text_and_says_with_what(made):
    arguments = ("generate", made.model_directory, "--prompt", PROMPT, "--memory", "local+external", "--datastore", made.directory, "--tokens", 8)
    done = trimline(*arguments, "--seed", 4, check=0)
    assert 1 < len(done.stdout.split()) <= 8
    assert "memory local+external (temperature 1, store temperature 1" in done.stderr
    assert trimline(*arguments, "--seed", 4, check=0).stdout == done.stdout
    assert "looks up a datastore" in trimline("generate", made.model_directory, "--memory", "knn", check=2).stderr
