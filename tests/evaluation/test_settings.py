"""What a recipe may ask of memories, before anything runs."""

import pytest

from pipeline import recipe
from pipeline.recipe import RecipeError

GOOD = """\
name: memory
tokenize: {sources: [embedded]}
pack: {length: 64}
model: {kind: decoder, max_length: 64}
pretrain: {objective: {name: causal}}
evaluate: {memory: [none, long+local, cache]}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return tmp_path / "recipe.yaml"


def test_memories_are_a_list_or_one_name_and_windows_half_a_row(path):
    settings = recipe.load(path).evaluate
    assert settings.memory == ["none", "local+long", "cache"]
    assert settings.windowed(64) == (32, 32)
    assert recipe.load(path, ["evaluate.memory=local"]).evaluate.memory == ["local"]
    assert recipe.load(path, ["evaluate.window.block=7"]).evaluate.windowed(64) == (7, 32)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluate.memory=local+lang"], "evaluate.memory: no memory is called 'local+lang'; one softmax: none, local,"),
        (["evaluate.memory=knn"], "evaluate.memory knn looks up a datastore: add an index section, or evaluate.datastore: DIR"),
        (["model.kind=encoder", "pretrain.objective.name=mlm"], "evaluate.memory tests a causal model; this one is an encoder"),
        (["evaluate.window={block: 40, context: 40}"], "evaluate.window: block 40 + context 40 exceeds model.max_length 64"),
        (["evaluate.long.size=32"], "long.size 32 is not above the window's context of 32 tokens"),
        (["pretrain=null", "pack=null"], "evaluate.memory tests a causal model: add a pretrain section, or model.from: DIR"),
        (["pretrain=null", "pack=null", "tokenize=null", "model.from=m"], "evaluate.memory reads held-out documents: add a tokenize section"),
        (["evaluate.memory=[]", "pretrain=null"], "evaluate needs a model: add a pretrain or a finetune section"),
    ],
)
def test_what_cannot_be_tested_is_refused(path, overrides, expected):
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_datastore_of_another_run_or_an_index_section_is_enough(path):
    assert recipe.load(path, ["evaluate.memory=knn+cache", "evaluate.datastore=somewhere"]).evaluate.searches
    assert recipe.load(path, ["evaluate.memory=local+external", "index={}"]).evaluate.searches
