"""A recipe: read, extended, overridden, checked; each mistake told with its place and remedy."""

from pathlib import Path

import pytest

from pipeline import recipe
from pipeline.recipe import RecipeError

ROOT = Path(__file__).parent.parent

GOOD = """\
name: small
tokenize:
  sources: [embedded]
pack:
  length: 64
pretrain:
  objective: {name: mlm}
  steps: 10
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refusal(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    assert recipe.load(path).stages


def test_stages_are_those_with_a_section_in_the_order_of_the_chain(written):
    assert recipe.load(written(GOOD)).stages == ["tokenize", "pack", "pretrain"]


def test_a_misspelt_key_is_named_with_file_line_and_nearest_key(written):
    path = written(GOOD.replace("length: 64", "lenght: 64"))
    assert refusal(path) == f"{path}:5: unknown key 'pack.lenght'; did you mean 'length'?"


def test_a_misspelt_key_of_an_objective_is_matched_with_that_objective(written):
    path = written(GOOD.replace("{name: mlm}", "{name: mlm, mask_rat: 0.2}"))
    assert f"{path}:7: unknown key 'pretrain.objective.mask_rat'; did you mean 'mask_rate'?" == refusal(path)


def test_an_unknown_section_names_the_nearest_one(written):
    assert "did you mean 'finetune'?" in refusal(written(GOOD + "fintune: {}\n"))


def test_a_wrong_value_shows_what_was_found(written):
    path = written(GOOD.replace("steps: 10", "steps: many"))
    message = refusal(path)
    assert message.startswith(f"{path}:8: pretrain.steps:")
    assert "'many'" in message


def test_every_mistake_of_a_recipe_is_told_at_once(written):
    message = refusal(written(GOOD.replace("length: 64", "lenght: 64").replace("steps: 10", "step: 10")))
    assert "pack.lenght" in message
    assert "pretrain.step" in message


MEMORY = """\
name: memory
tokenize: {sources: [embedded]}
pack: {length: 64, segments: within, groups: consecutive, group_size: 4}
model: {kind: decoder}
pretrain: {objective: {name: trimelm_long}, batch_size: 16, ranks_per_group: 2}
"""


def test_a_long_memory_of_shared_groups_is_a_recipe(written):
    settings = recipe.load(written(MEMORY)).pretrain
    assert settings.objective.needs == "groups"
    assert recipe.load(written(MEMORY), ["pretrain.objective.local_dropped=0.5", "pretrain.objective.name=trimelm_ext"]).pretrain.ranks_per_group == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pack.groups=random"], "objective trimelm_long needs pack.groups consecutive; it is random"),
        (
            ["pack.group_size=1", "pack.groups=random", "pretrain.objective.name=trimelm_ext"],
            "trimelm_ext needs groups of two or more; pack makes groups of 1",
        ),
        (["pretrain.ranks_per_group=3"], "objective trimelm_long has groups of 4: set it to a divisor of that"),
        (["pretrain.objective.name=trimelm"], "objective trimelm has groups of 1"),
        (["model={from: somewhere}"], "objective trimelm_long trains a model of kind decoder; model.kind is encoder"),
        (["model.kind=encoder"], "objective trimelm_long trains a model of kind decoder"),
        (["pretrain.objective.local_drop=0.5"], "unknown key 'pretrain.objective.local_drop'"),
        (["pretrain.objective.name=trimelm_ext", "pretrain.objective.local_dropped=1.5"], "less than or equal to 1, found 1.5"),
        (["pretrain.time_budget=5"], "set objective.ce_warmup_ratio: 0, or leave the budget out"),
    ],
)
def test_an_objective_with_memory_says_what_it_needs(written, overrides, expected):
    assert expected in refusal(written(MEMORY), *overrides)


def test_a_key_given_twice_is_refused(written):
    assert "length is given twice" in refusal(written(GOOD.replace("length: 64", "length: 64\n  length: 32")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\n", "the recipe has no stage"),
        ("name: x\npack: {}\n", "pack needs tokenize"),
        (GOOD.replace("name: mlm", "name: causal"), "objective causal trains a model of kind decoder; model.kind is encoder"),
        (GOOD.replace("length: 64", "length: 640"), "pack.length 640 exceeds model.max_length 512"),
        (
            GOOD.replace("mlm", "electra, generator: {heads: 5, ffn: 1024}"),
            "generator: heads 5 (the model has 4): it must not be larger than the model",
        ),
        (GOOD + "  notes: {frequency: [500, 100]}\n", "frequency [500, 100]: expected the least and the most occurrences of a word, 1 <= from <= to"),
        (
            GOOD.replace("mlm", "causal") + "  notes: {}\nmodel: {kind: decoder}\n",
            "pretrain.notes are of the words on both sides, which objective causal does not see: leave notes out",
        ),
        (GOOD.replace("mlm", "distill"), "distill has the model of model.from as its teacher: set model.from: DIR"),
        (GOOD.replace("mlm", "distill") + "model: {from: x}\n", "distill needs a student smaller than its teacher: give objective.student"),
        (GOOD.replace("mlm", "distill, prediction: 0, layers: 0"), "prediction, layers and attention are 0"),
        (GOOD.replace("mlm", "electra") + "  sparsity: {}\n", "prunes under mlm, distill and causal without chunk, not under this electra"),
        (GOOD + "  sparsity: {target: [0.5, 0.6]}\n", "takes one target, or a shape"),
        (GOOD + "  sparsity: {}\n  notes: {}\n", "both act beside the model"),
        (GOOD + "  sparsity: {}\n  time_budget: 5\n", "reach their target by steps"),
        (
            GOOD.replace("mlm", "distill, attention: 1") + "  sparsity: {}\nmodel: {from: x}\n",
            "masks on heads, whose attention objective.attention would teach: set objective.attention: 0",
        ),
        (GOOD + "  sparsity: {}\nfinetune: {}\nprune: {}\n", "prune takes layers that are whole and alike, which pretrain.sparsity does not leave"),
        (
            GOOD + "  sparsity: {shape: {layers: 2, heads: 2, ffn: 64}}\nfinetune: {}\nprune: {}\n",
            "prune takes layers that are whole and alike, which pretrain.sparsity does not leave",
        ),
        (GOOD + "finetune: {}\nprune: {recovery: {ranks: 2}}\n", "prune.recovery.ranks: the recovery runs on the ranks of prune; set prune.ranks"),
        (GOOD + "model: {hidden: 30, heads: 4}\n", "hidden 30 is not a multiple of heads 4"),
        (GOOD + "prune: {}\n", "prune needs finetune"),
        (GOOD + "finetune: {}\nprune: {time_budget: 5}\n", "prune.time_budget: the masks reach their target by steps"),
        (GOOD + "finetune: {}\nprune: {sparsity: {target: [0.8, 0.6]}}\n", "target [0.8, 0.6]: give one or more, each above the one before"),
        (GOOD + "finetune: {}\nprune: {sparsity: {target: null}}\n", "target []: give one or more, each above the one before"),
        (GOOD + "finetune: {}\nprune: {sparsity: {target: 1.2}}\n", "prune.sparsity.target.0: input should be less than 1, found 1.2"),
        (GOOD + "finetune: {}\nprune: {sparsity: {target: 0.5, speed_up: 2}}\n", "target and speed_up are different things to reach; give one"),
        (GOOD + "finetune: {}\nprune: {sparsity: {units: [heads, heads]}}\n", "units ['heads', 'heads']: name each once"),
        (GOOD + "finetune: {}\nprune: {method: one-shot, sparsity: {head_share: null}}\n", "sparsity.head_share is null"),
        (GOOD + "finetune: {}\nprune: {method: one-shot, sparsity: {units: [heads]}}\n", "prune.method one-shot ranks heads and neurons"),
        (
            GOOD + "finetune: {}\nprune: {distillation: {teacher_outputs: x.npz, layers: 0, augment: 5}}\n",
            "augment: 5 has the teacher speak of new texts",
        ),
        (
            GOOD + "finetune: {task: {squad: {train: a, dev: b}}}\nprune: {distillation: {augment: 5}}\n",
            "prune.distillation.augment exchanges words, also those of answers; finetune.task is squad",
        ),
        (GOOD + "finetune: {}\nprune: {distillation: {teacher_outputs: x.npz}}\n", "layers: 0.5 learns a teacher's hidden states"),
        (GOOD + "finetune: {}\nprune: {method: student}\n", "say how small by sparsity.shape: {layers, heads, ffn}"),
        (GOOD + "finetune: {}\nprune: {distillation: {prediction: 0, layers: 0}}\n", "nothing is learnt; give one of them a weight"),
        (
            GOOD + "finetune: {task: {squad: {train: a, dev: b}}}\nprune: {distillation: {teacher_outputs: x.npz, layers: 0}}\n",
            "prune.distillation.teacher_outputs holds logits of labels; finetune.task is squad",
        ),
        (GOOD.replace("length: 64", "groups: consecutive"), "groups: consecutive needs group_size of 2 or more"),
        ("name: x\nfinetune: {}\n", "finetune needs a model"),
        ("a: [\n", "not valid YAML"),
        ("- a\n", "a recipe is a mapping"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_runs(written, text, expected):
    assert expected in refusal(written(text))


def test_an_inherited_target_gives_way_to_another_goal(written):
    path = written(GOOD + "finetune: {}\nprune: {sparsity: {target: 0.8}}\n")
    for goal in ("speed_up=5", "shape={layers: 2, heads: 4, ffn: 64}"):
        assert "set what is inherited to null" in refusal(path, f"prune.sparsity.{goal}")
        recipe.load(path, ["prune.sparsity.target=null", f"prune.sparsity.{goal}"])


def test_a_missing_recipe_and_one_that_is_not_utf8_are_told(tmp_path):
    assert "no such recipe" in refusal(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "not UTF-8 text (byte 9)" in refusal(tmp_path / "latin.yaml")


def test_yaml_cannot_run_code(tmp_path, written):
    flag = tmp_path / "ran"
    path = written(f"name: !!python/object/apply:os.mkdir ['{flag}']\n")
    assert "not valid YAML" in refusal(path)
    assert not flag.exists()


def test_overrides_come_last_and_make_missing_sections(written):
    loaded = recipe.load(written(GOOD), ["pretrain.steps=20", "pretrain.lr=1e-3", "model.layers=2", "evaluate={}"])
    assert (loaded.pretrain.steps, loaded.pretrain.lr, loaded.model.layers) == (20, 1e-3, 2)
    assert loaded.stages[-1] == "evaluate"


def test_a_bad_override_is_named(written):
    path = written(GOOD)
    assert "expected key=value" in refusal(path, "pretrain.steps")
    assert refusal(path, "pretrain.stepz=3").startswith("override 'pretrain.stepz=3': unknown key 'pretrain.stepz'; did you mean 'steps'?")
    assert "pretrain.steps is not a section" in refusal(path, "pretrain.steps.more=1")


def test_extends_merges_over_one_parent_and_keeps_its_lines(written):
    parent = written(GOOD, "parent.yaml")
    child = written("extends: parent.yaml\nname: child\npretrain:\n  steps: 99\n", "child.yaml")
    loaded = recipe.load(child)
    assert (loaded.name, loaded.pretrain.steps, loaded.pack.length) == ("child", 99, 64)
    written(GOOD.replace("length: 64", "lenght: 64"), "parent.yaml")
    assert f"{parent}:5" in refusal(child)


def test_a_recipe_that_extends_itself_is_refused(written):
    written("extends: b.yaml\nname: a\n", "a.yaml")
    written("extends: a.yaml\nname: b\n", "b.yaml")
    assert "extends itself" in refusal(Path(written("extends: a.yaml\nname: c\n", "c.yaml")))


def test_explain_gives_meaning_unit_and_default_and_the_nearest_key():
    assert "[steps, default 1000]" in recipe.explain("pretrain.steps")
    assert "mask_rate" in recipe.explain("pretrain.objective")
    with pytest.raises(RecipeError, match=r"did you mean 'pretrain.steps'"):
        recipe.explain("pretrain.step")


def test_every_field_of_every_section_is_described():
    def undescribed(model, at=""):
        for name, field in model.model_fields.items():
            if not field.description and name != "name":
                yield f"{at}{name}"
            for below in recipe._models_in(field.annotation):
                yield from undescribed(below, f"{at}{name}.")

    assert list(undescribed(recipe.Recipe)) == []
