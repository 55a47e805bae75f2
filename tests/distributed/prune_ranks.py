"""Prune stages, as the ranks run them:  python prune_ranks.py RUNS.json

Each run has a toy task and model of its own place, with what the stage is to be given, and may die at a step of a phase.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.compression.masks import Masks
from pipeline.launch.ranks import Ranks, leaving
from pipeline.models import export
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForQuestionAnswering, TrimlineForSequenceClassification
from pipeline.recipe import Recipe
from pipeline.stages import prune
from pipeline.tasks.questions import QuestionTask
from pipeline.tasks.squad import Question
from pipeline.tasks.task import Example, Task
from pipeline.training import engine
from pipeline.workflow import Work

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"w{number}" for number in range(20))]
TRAINING = {"batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "log_every": 1, "checkpoint_every": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", 2), ("</s>", 3)]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special)
    roles = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{role}_token": word for role, word in roles.items()})


def task(squad: bool) -> Task | QuestionTask:
    """Texts of uneven length."""
    draws = np.random.default_rng(0)
    texts = [" ".join(draws.choice(WORDS[5:], draws.integers(3, 9))) for _ in range(48)]
    if squad:
        questions = [Question(str(number), "w1 w2", text, (text.split()[1],), (text.index(" ") + 1,)) for number, text in enumerate(texts)]
        return QuestionTask({"train": questions[:32], "dev": questions[32:], "test": questions[32:]}, 80, 4, 3)
    examples = [Example(text, None, int(text < "w3")) for text in texts]
    return Task({"train": examples[:32], "dev": examples[32:], "test": examples[32:]}, ("no", "yes"), ("accuracy",), 16)


def run(asked: dict[str, Any], place: Path) -> None:
    directory, ranks = place / asked["name"], Ranks.here()
    finetuned = place / f"{'questions' if asked.get('squad') else 'labels'}-{asked['dropout']}"
    if ranks.first and not finetuned.is_dir():
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 32, "head_dim": 8, "heads_per_layer": [4, 4], "ffn_per_layer": [48, 48]}
        config = TrimlineConfig(**shape, dropout=asked["dropout"], max_position_embeddings=96, initializer_range=0.2)
        model = (TrimlineForQuestionAnswering if asked.get("squad") else TrimlineForSequenceClassification)(config)
        export.save(model, tokenizer(), finetuned / "model")
        task(bool(asked.get("squad"))).save(finetuned / "task.json")
    ranks.barrier()
    settings = {"epochs": 2, **TRAINING, "recovery": {"epochs": 1, **TRAINING}, **asked["prune"]}
    if "deepspeed" in asked:
        settings |= {"deepspeed": asked["deepspeed"], "recovery": {**settings["recovery"], "deepspeed": asked["deepspeed"]}}
    recipe = Recipe.model_validate({"name": "toy", "model": {"from": str(finetuned)}, "finetune": {}, "prune": settings})
    work = Work("prune", recipe, {"finetune": Artifact(finetuned, {"fingerprint": "0" * 64})}, directory, directory / "logs", ranks)
    (directory / "scratch").mkdir(parents=True, exist_ok=True)
    with Dying(asked.get("dies")):
        figures = prune.run(work)
    if ranks.first:
        (directory / "figures.json").write_text(json.dumps(figures))


class Dying:
    """The last rank kills itself when it asks for that batch of that training, both counted from 0, in this start."""

    def __init__(self, at: list[int] | None) -> None:
        self.at, self.training, self.inner = at, -1, prune.train

    def __enter__(self) -> None:
        prune.train = self.train  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        prune.train = self.inner

    def train(self, trainee: Any, batches: Any, *arguments: Any, **options: Any) -> Any:
        self.training += 1
        training, inner = self.training, batches.batch

        def batch(step: int, rank: int = 0, world: int = 1) -> Any:
            if [training, step] == self.at and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(step, rank, world)

        batches.batch = batch
        masks: Masks | None = trainee.side
        assert masks is None or all(parameter.dtype == torch.float32 for parameter in masks.parameters())
        return self.inner(trainee, batches, *arguments, **options)


def main() -> None:
    engine.start()  # so that ranks wait for one another
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        run(asked, Path(sys.argv[1]).parent)


if __name__ == "__main__":
    with leaving():
        main()
