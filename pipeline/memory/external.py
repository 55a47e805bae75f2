"""A datastore beside the model that asks it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.memory.datastore import Datastore
from pipeline.models import build, identity
from pipeline.models.causal_reader import CausalReader


@dataclass(frozen=True)
class External:
    """encoder: the model whose states are the queries; None: the model's own are."""

    store: Datastore
    encoder: CausalReader | None

    @classmethod
    def open(cls, directory: str | Path, model: str | Path, tokenizer_fingerprint: str, *, trust_remote_code: bool = False) -> External:
        """The datastore of a directory, for the model of another. Raises UserError when its keys or values are not theirs."""
        store = Datastore.open(directory)
        asks = Path(model) if store.encoder is None else store.encoder
        store.check(identity.fingerprint(asks), tokenizer_fingerprint)
        if store.encoder is None:
            return cls(store, None)
        return cls(store, CausalReader(build.load(asks, head="causal", trust_remote_code=trust_remote_code), store.memory_module))

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        """Raises UserError when the encoder cannot read what the model reads: rows of `length` tokens."""
        if self.encoder is not None:
            build.check_fits(self.encoder.model, tokenizer, length)

    @property
    def identity(self) -> str:
        """Other for other answers."""
        return f"{self.store.revision} probe {self.store.probe}"
