"""The `index` section of a recipe: the datastore of keys and values."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.corpus.settings import Source
from pipeline.settings import Settings, setting


class IndexWindowSettings(Settings):
    """How the text is read for keys; the closer to how it is read at test, the better keys and queries match."""

    block: int | None = setting(None, "Tokens that a window adds; each gives one key. Default: half of pack.length.", unit="tokens", ge=1)
    context: int | None = setting(None, "Tokens before them that are read again; default: half of pack.length.", unit="tokens", ge=0)

    def resolved(self, row_length: int | None) -> tuple[int, int]:
        """block and context, for rows of so many tokens; where nothing is packed, of 256."""
        half = max((row_length or 256) // 2, 1)
        return self.block or half, half if self.context is None else self.context


class IndexSettings(Settings):
    sources: tuple[Source, ...] = setting((), "Documents to index, as in tokenize.sources; default: those the run trains on.")
    max_keys: int | None = setting(None, "Keys at most, of whole documents spread evenly; default: all.", unit="keys", ge=1)
    window: IndexWindowSettings = setting(IndexWindowSettings(), "How the text is read for keys.")
    encoder: str | None = setting(
        None,
        "Directory of another causal model with the run's tokenizer, a smaller one, whose states are keys and queries; default: the run's model.",
    )
    metric: Literal["ip", "l2"] = setting("ip", "Nearness of query and key: inner product, or Euclidean distance.")
    kind: Literal["auto", "flat", "ivfpq"] = setting(
        "auto", "flat: every key is scored; ivfpq: inverted lists of product-quantised keys; auto: flat below 100,000 keys, else ivfpq."
    )
    keep_keys: bool = setting(True, "Keep the keys (fp16), so that what ivfpq finds is scored exactly. flat always keeps them.")
    lists: int | None = setting(None, "Inverted lists; default: about 4 sqrt(keys), a power of 2.", unit="lists", ge=1)
    subquantizers: int | None = setting(
        None, "Parts of a key, a code each; a divisor of its dimensions. Default: the largest up to 64 that leaves a part 2 dimensions.", ge=1
    )
    bits: Literal[4, 8] | None = setting(None, "Bits of a code. 4 are searched fastest; default: 4 where keys are kept, else 8.", unit="bits")
    reduce: int | None = setting(
        None, "Principal components that ivfpq searches in; default: 128 where keys are kept, else all.", unit="dimensions", ge=1
    )
    shard_keys: int = setting(
        1_000_000, "Keys of a shard, the unit of parallel work and of resuming; a longer document is not cut.", unit="keys", ge=1
    )
    batch_size: int = setting(16, "Windows read at a time.", unit="windows", ge=1, result=False)
    ranks: int = setting(1, "Local MPI ranks.", ge=1, result=False)

    @model_validator(mode="after")
    def _compatible(self) -> IndexSettings:
        if self.kind == "flat" and not self.keep_keys:
            raise ValueError("kind flat searches the keys themselves: set keep_keys: true, or kind: ivfpq")
        if self.reduce and self.subquantizers and self.reduce % self.subquantizers:
            raise ValueError(f"subquantizers {self.subquantizers} is not a divisor of reduce {self.reduce}")
        return self
