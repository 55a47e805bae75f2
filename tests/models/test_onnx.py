"""In onnxruntime, graphs of batches and lengths they were not made with."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import onnx
from pipeline.models.modeling_trimline import (
    TrimlineForCausalLM,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlineForSequenceClassification,
)
from pipeline.models.positions import SCHEMES

runtime = pytest.importorskip("onnxruntime")

MODELS = {
    "absolute": (TrimlineForSequenceClassification, {"type_vocab_size": 2, "num_labels": 3}),
    "sinusoidal": (TrimlineForQuestionAnswering, {"norm": "pre"}),
    "absolute-relative": (TrimlineForMaskedLM, {}),
    "tupe-absolute": (TrimlineForSequenceClassification, {"untie_cls": False}),
    "tupe-relative": (TrimlineForQuestionAnswering, {"unpadded": True}),
    "rope": (TrimlineForCausalLM, {"kind": "decoder", "norm": "pre"}),
    "alibi": (TrimlineForSequenceClassification, {"activation": "relu"}),
}
"""Each position scheme once, and each head."""


@pytest.mark.parametrize("positions", SCHEMES)
def test_a_pruned_models_graph_gives_its_outputs_at_any_batch_and_length(make_config, pruned, tmp_path, positions):
    model_class, changes = MODELS[positions]
    config = make_config(positions=positions, **changes)
    model = pruned(model_class(config).eval())
    onnx.export(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for rows, length in ((3, 8), (1, 1), (1, 13), (5, 16), *[(2, 40)] * (positions in ("rope", "alibi", "sinusoidal"))):
        mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).long()
        mask[0] = 1
        batch = {"input_ids": torch.randint(5, 40, (rows, length)) * mask, "attention_mask": mask}
        if config.type_vocab_size:
            batch["token_type_ids"] = torch.randint(0, 2, (rows, length))
        expected = model(**batch)
        names = [output.name for output in session.get_outputs()]
        assert names == (["start_logits", "end_logits"] if model_class is TrimlineForQuestionAnswering else ["logits"])
        for name, found in zip(names, session.run(None, {name: tensor.numpy() for name, tensor in batch.items()}), strict=True):
            wanted = expected[name].detach().numpy()
            real = mask.bool().numpy() if wanted.shape[:2] == mask.shape else slice(None)
            np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


def test_without_its_packages_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript, not installed: pip install 'trimline\[onnx\]'"):
        onnx.check()
