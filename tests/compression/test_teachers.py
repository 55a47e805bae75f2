import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import pre_tokenizers, processors

from pipeline.compression import teachers
from pipeline.compression.distillation import Distillation
from pipeline.compression.layer_distillation import LayerDistillation
from pipeline.compression.settings import DistillationSettings
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineForQuestionAnswering
from pipeline.tasks.batches import TaskBatches
from pipeline.tasks.questions import QuestionTask
from pipeline.tasks.squad import Question


def model(labels=("no", "yes"), vocabulary=50, width=32, heads=(4, 4)):
    names = dict(enumerate(labels))
    config = {"id2label": names, "num_labels": len(names), "vocab_size": vocabulary, "hidden_size": width, "heads_per_layer": list(heads)}
    return SimpleNamespace(config=SimpleNamespace(name_or_path="DIR", **config))


@pytest.mark.parametrize(
    ("teacher", "labels", "message"),
    [
        ({"labels": ("yes", "no")}, ("no", "yes"), "its labels are yes, no, the task's no, yes, in this order"),
        ({"labels": ("no", "yes", "perhaps")}, ("no", "yes"), "its labels are no, yes, perhaps, the task's no, yes"),
        ({}, (), "its labels are no, yes, the task's a number"),
        ({"vocabulary": 60}, ("no", "yes"), "it knows 60 tokens, the student 50"),
        ({"width": 64}, ("no", "yes"), "its hidden states have 64 dimensions, the student's 32; set distillation.layers: 0"),
        ({"width": 64}, None, "its hidden states have 64 dimensions"),
        ({"heads": (4, 4, 4)}, None, r"its layers have \[4, 4, 4\] heads, the student's before pruning \[4, 4\]; set distillation.attention: 0"),
    ],
)
def test_a_teacher_that_cannot_be_learnt_from_is_told(teacher, labels, message):
    with pytest.raises(UserError, match=f"DIR: the student cannot learn from this teacher: {message}"):
        teachers.check(model(**teacher), model(), labels, layers=True, heads=True)


@pytest.mark.parametrize(
    ("teacher", "labels", "layers"),
    [({}, ("no", "yes"), True), ({"width": 64}, ("no", "yes"), False), ({"labels": ("LABEL_0",)}, (), True), ({"labels": ("a",)}, None, True)],
)
def test_one_that_can_is_taken(teacher, labels, layers):
    """A regression's only label has no name that matters, answers that are spans have none; outputs alone may come from any width."""
    teachers.check(model(**teacher), model(), labels, layers=layers, heads=layers)


@pytest.fixture
def questions(tokenizer):
    """Batches of two windows of questions on texts of uneven length."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    texts = [" ".join(f"w{(7 * length + place) % 45}" for place in range(length)) for length in range(3, 10)]
    asked = [Question(str(number), "w1 w2", text, (text.split()[0],), (0,)) for number, text in enumerate(texts)]
    return TaskBatches(asked, tokenizer, QuestionTask({"train": asked, "dev": [], "test": []}, 12, 2, 3), 2, seed=1)


@pytest.mark.parametrize("taught", [(0, 2), ()])
def test_a_teachers_answers_are_written_down_as_it_gives_them(encoder, questions, tmp_path, taught):
    teacher, student = (encoder(kind=TrimlineForQuestionAnswering, seed=seed) for seed in (1, 2))
    teachers.record(teacher, questions, taught, tmp_path / "teacher", torch.device("cpu"))
    wrote = sum(path.stat().st_size - 128 for path in (tmp_path / "teacher").iterdir())  # of arrays, without their headers
    assert wrote == teachers.size(teacher, questions, taught)
    recorded = teachers.recorded(tmp_path / "teacher", questions, taught)
    for step in range(3):
        batch = {name: torch.from_numpy(array) for name, array in questions.batch(step).items()}
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            said = teacher(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        found = recorded.outputs(batch["example"], batch["attention_mask"])
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(found[name][real], said[name][real], atol=1e-5, rtol=1e-5)
        for layer in taught:
            torch.testing.assert_close(found["hidden_states"][layer + 1][real], said.hidden_states[layer + 1][real], atol=2e-3, rtol=1e-3)
        losses = [
            Distillation(source, DistillationSettings(), None, LayerDistillation(taught, 32) if taught else None)(student, batch, step)
            for source in (recorded, teacher)
        ]
        assert losses[0].keys() == losses[1].keys() == {"distill", *(("layers", *(f"matched_{layer + 1}" for layer in taught)) if taught else ())}
        for name, loss in losses[0].items():
            assert loss.item() == pytest.approx(losses[1][name].item(), rel=1e-3)


def test_a_teacher_of_questions_has_a_head_for_them(tmp_path):
    path = tmp_path / "config.json"
    for name in ("BertForQuestionAnswering", "TrimlineForQuestionAnswering"):
        path.write_text(f'{{"architectures": ["{name}"]}}')
        teachers.check_answers(tmp_path)
    for text in ('{"architectures": ["BertForSequenceClassification"]}', "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match="not one that was trained on questions"):
            teachers.check_answers(tmp_path)
