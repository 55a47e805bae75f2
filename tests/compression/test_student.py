import copy

import pytest
import torch

from pipeline.compression.student import student
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineForMaskedLM
from pipeline.models.positions import SCHEMES
from pipeline.objectives.settings import StudentSettings


def outputs(model):
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        return model(ids, torch.ones_like(ids))


@pytest.mark.parametrize("positions", SCHEMES)
def test_a_student_of_whole_layers_is_the_teacher_without_those_between(encoder, positions):
    teacher = encoder(kind=TrimlineForMaskedLM, positions=positions).requires_grad_(False)
    made = student(teacher, StudentSettings(layers=2, heads=4, ffn=48))
    shorter = copy.deepcopy(teacher)
    del shorter.model.layers[0]  # of three layers the second and the third
    assert (made.config.heads_per_layer, made.config.ffn_per_layer, made.config.num_hidden_layers) == ([4, 4], [48, 48], 2)
    torch.testing.assert_close(outputs(made).logits, outputs(shorter).logits)
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_a_narrower_student_has_the_heads_and_neurons_of_largest_weights_and_loads_again(encoder):
    teacher = encoder(kind=TrimlineForMaskedLM, positions="tupe-relative")
    with torch.no_grad():
        for block in teacher.model.layers:
            block.attention.value.weight[16:24] *= 10  # the third head
            block.feed_forward.up.weight[7] *= 10
    made = student(teacher, StudentSettings(layers=1, heads=1, ffn=1))
    assert made.config.heads_kept == [[2]]
    top = teacher.model.layers[2]
    assert torch.equal(made.model.layers[0].attention.value.weight, top.attention.value.weight[16:24])
    assert torch.equal(made.model.layers[0].feed_forward.up.weight, top.feed_forward.up.weight[7:8])
    again = TrimlineForMaskedLM(made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(outputs(again).logits, outputs(made).logits)


def test_a_random_student_has_new_layers_between_the_teachers_embeddings_and_head(encoder):
    teacher = encoder(kind=TrimlineForMaskedLM)

    def drawn(seed):
        torch.manual_seed(seed)
        return student(teacher, StudentSettings(layers=2, heads=2, ffn=16, initial="random"))

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one.model.layers[1].feed_forward.up.weight, again.model.layers[1].feed_forward.up.weight)
    assert not torch.equal(one.model.layers[1].feed_forward.up.weight, other.model.layers[1].feed_forward.up.weight)
    assert one.model.layers[0].attention.value.weight.std().item() == pytest.approx(0.2, rel=0.15)
    assert (one.model.layers[0].attention_norm.weight == 1).all()
    for name in ("model.embeddings.word.weight", "model.embeddings.norm.bias", "head.dense.weight"):
        assert torch.equal(one.state_dict()[name], teacher.state_dict()[name])
    torch.testing.assert_close(outputs(one).logits.shape, outputs(teacher).logits.shape)


def test_a_student_larger_than_its_teacher_is_refused(encoder):
    with pytest.raises(UserError, match="layers is 4, the model has 3; heads is 5, the model has 4"):
        student(encoder(kind=TrimlineForMaskedLM), StudentSettings(layers=4, heads=5, ffn=8))
