"""Small datastores: random documents, a tiny decoder, and what numpy says the nearest entries are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.store import Store, Writer, token_dtype
from pipeline.launch.ranks import Ranks
from pipeline.memory import building, reading
from pipeline.memory.building import Window
from pipeline.memory.settings import IndexSettings
from pipeline.models import export, identity
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM
from pipeline.packing.plan import tokenizer_identity

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
WINDOW = Window(block=8, context=4, batch_size=4)


def word_tokenizer(directory: Path, words: int = 60) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *(f"w{number}" for number in range(len(SPECIALS), words))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>", **roles)
    tokenizer.save_pretrained(directory)
    return tokenizer


def token_store(directory: Path, documents: int, words: int = 60, seed: int = 0) -> Store:
    """Random documents of 2 to 29 tokens and an end token."""
    draws = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    with Writer(directory / "00000", token_dtype(words)) as writer:
        for length in draws.integers(2, 30, size=documents):
            writer.add([*draws.integers(len(SPECIALS), words, size=length), 3])
    return Store.open(directory)


def decoder(directory: Path, words: int = 60, seed: int = 0) -> TrimlineForCausalLM:
    """An untrained decoder of width 16 whose states are far apart."""
    torch.manual_seed(seed)
    config = TrimlineConfig(
        vocab_size=words, hidden_size=16, head_dim=8, heads_per_layer=[2], ffn_per_layer=[32], kind="decoder", norm="pre",
        max_position_embeddings=32, initializer_range=0.5, dropout=0.0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = TrimlineForCausalLM(config).eval()
    export.save(model, None, directory)
    return model


class Made:
    """One datastore and all that it was made of."""

    def __init__(self, root: Path, documents: int = 40, words: int = 60, ranks: tuple[Ranks, ...] = (Ranks(),), **settings: object):
        self.tokenizer = word_tokenizer(root / "tokenizer", words)
        self.store = token_store(root / "text", documents, words) if not (root / "text").exists() else Store.open(root / "text")
        self.model = decoder(root / "model", words)
        self.model_directory, self.directory = root / "model", root / "datastore"
        self.settings = IndexSettings.model_validate(settings)
        self.about = {"path": str(self.model_directory), "fingerprint": identity.fingerprint(self.model_directory)}
        self.about |= {"memory_module": None, "encoder": False}
        for rank in ranks:
            self.build(rank)

    def build(self, ranks: Ranks = Ranks()) -> None:  # noqa: B008 frozen
        building.build(
            self.directory, self.store, [f"train document {number}" for number in range(len(self.store))], CausalReader(self.model), self.settings,
            WINDOW, model=self.about, tokenizer=self.tokenizer, tokenizer_directory=self.model_directory.parent / "tokenizer",
            tokenizer_fingerprint=tokenizer_identity(self.tokenizer), seed=3, ranks=ranks,
        )  # fmt: skip

    def entries(self, documents: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Keys float16 [n, d] and values [n], read one document and one window at a time."""
        keys, values = [], []
        for document in range(len(self.store)) if documents is None else documents:
            text = reading.Text.of(self.store, np.array([document]))
            for span in reading.windows(text, WINDOW.block, WINDOW.context, within_documents=True):
                for batch in reading.read(CausalReader(self.model), text, span[None], batch_size=1):
                    _, states, places = batch.scored()
                    keys.append(states.half().numpy())
                    values.append(text.tokens[places])
        return np.concatenate(keys), np.concatenate(values)


def nearest(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """By the formulas, in float64."""
    wide = keys.astype(np.float64)
    if metric == "ip":
        scores = queries @ wide.T / np.sqrt(keys.shape[1])
    else:
        scores = -np.square(queries[:, None] - wide).sum(axis=2) / (2 * np.sqrt(keys.shape[1]))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), values[order]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file; the datastore's place does not count."""
    place = str(directory.parent).encode()
    return {
        str(path.relative_to(directory)): path.read_bytes().replace(place, b"")
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
