"""Text, a plan of it, and a loader that dies, for the trainings that ranks run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.store import Store, Writer
from pipeline.packing import plan as plans
from pipeline.packing.loader import Loader
from pipeline.packing.settings import PackSettings

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"w{number}" for number in range(5, 60))]
ROLES = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "bos": "<s>", "sep": "</s>", "eos": "</s>", "mask": "<mask>"}


def data(directory: Path, settings: PackSettings, kind: Literal["encoder", "decoder"]) -> tuple[Store, PreTrainedTokenizerFast, plans.Plan]:
    """Documents of uneven length, each over few words of its own, so that a memory has what comes next."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{f"{role}_token": word for role, word in ROLES.items()})
    draws = np.random.default_rng(0)
    (directory / "store").mkdir(parents=True)
    with Writer(directory / "store" / "00000", np.uint16) as writer:
        for _ in range(80):
            writer.add([*(5 + draws.choice(55, 6)[draws.integers(0, 6, draws.integers(20, 60))]), 3])
    store = Store.open(directory / "store")
    return store, tokenizer, plans.make(directory / "plan", settings, kind, store, tokenizer)


class Dying(Loader):
    """A loader whose batch kills this process at one step."""

    dies_at: int | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        if step == self.dies_at and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, rank, world)
