from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.artifacts import Artifact
from pipeline.models import export
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForSequenceClassification
from pipeline.objectives.classify import Classify
from pipeline.recipe import Recipe
from pipeline.tasks import task as tasks
from pipeline.tasks.batches import TaskBatches

GOOD, BAD = [f"good{n}" for n in range(8)], [f"bad{n}" for n in range(8)]
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


def word_tokenizer():
    """A word, a token; `<s> ... </s>` around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *GOOD, *BAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def table(path, rows, seed):
    """Is a text of seven words more good than bad?"""
    draws = np.random.default_rng(seed)
    lines = ["text\tlabel"]
    for _ in range(rows):
        words = draws.choice(GOOD + BAD, size=7)
        lines.append(f"{' '.join(words)}\t{'good' if sum(word in GOOD for word in words) > 3 else 'bad'}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory):
    """A recipe on a toy task, and the artifact of its finetune stage: a two-layer encoder that has learnt the task."""
    directory = tmp_path_factory.mktemp("finetuned")
    rows = {"train": 512, "dev": 150, "test": 160}
    names = {split: table(directory / f"{split}.tsv", rows[split], seed) for seed, split in enumerate(rows)}
    recipe = Recipe.model_validate(
        {
            "name": "toy",
            "seed": 1,
            "runs_dir": str(directory),
            "model": {"from": str(directory)},
            "finetune": {"task": {**names, "max_length": 16}},
            "prune": {
                "epochs": 8, "batch_size": 32, "lr": 1e-3, "sparsity": {"target": 0.6}, "distillation": {"hard_labels": 0.2},
                "recovery": {"epochs": 2, "batch_size": 32, "lr": 1e-3}, "log_every": 50, "checkpoint_every": 100,
            },
            "evaluate": {"latency": {"batch_size": 4, "length": 8, "repeats": 3}},
        }
    )  # fmt: skip
    tokenizer = word_tokenizer()
    task = tasks.load(recipe.finetune.task, recipe.seed)
    torch.manual_seed(0)
    config = TrimlineConfig(
        vocab_size=len(tokenizer), hidden_size=32, head_dim=8, heads_per_layer=[4, 4], ffn_per_layer=[64, 64], dropout=0.0,
        max_position_embeddings=16, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    model, objective = TrimlineForSequenceClassification(config), Classify()
    batches = TaskBatches(task.splits["train"], tokenizer, task, 32, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        batch = {name: torch.from_numpy(array) for name, array in batches.batch(step).items()}
        objective(model, batch, step)["classify"].backward()
        optimizer.step()
        optimizer.zero_grad()
    artifact = directory / "finetune-00000000"
    export.save(model, tokenizer, artifact / "model")
    task.save(artifact / "task.json")
    manifest = {"fingerprint": "0" * 64, "seconds": 12.5, "metrics": {"dev_accuracy": 0.97}, "versions": {"torch": torch.__version__}}
    return SimpleNamespace(recipe=recipe, artifact=Artifact(artifact, manifest), model=model.eval(), tokenizer=tokenizer, task=task)
