"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator, model_validator

from pipeline.memory.kinds import Memory
from pipeline.memory.settings import IndexWindowSettings
from pipeline.settings import Settings, setting


class LatencySettings(Settings):
    batch_size: int = setting(32, "Rows a forward pass.", unit="rows", ge=1)
    length: int = setting(128, "Length of each row.", unit="tokens", ge=8)
    repeats: int = setting(30, "Timed passes of each model, taken in turn; the median counts.", unit="passes", ge=3)
    threads: int | None = setting(None, "CPU threads; default: PyTorch's.", ge=1)


class WindowSettings(IndexWindowSettings):
    """How the text is read when it is scored."""

    block: int | None = setting(None, "Tokens scored in one window; default: half of pack.length.", unit="tokens", ge=1)


class LongSettings(Settings):
    size: int = setting(1024, "Scored places before the window that are kept, first in, first out.", unit="entries", ge=1)
    reset: bool = setting(True, "Whether it is emptied where a document ends.")
    keep_duplicates: bool = setting(False, "Keep, as in the paper, those of them that the window's context holds again.")


class ExternalSettings(Settings):
    k: list[int] = setting([16, 64, 256, 1024], "Nearest entries that count; several: tuned among these.", unit="entries", min_length=1)
    probe: int = setting(32, "Inverted lists that a query visits: more of them miss less, and take longer.", unit="lists", ge=1)
    skip_confident: float | None = setting(
        None, "Do not search for a token where the model gives some token at least this probability; default: always search.", gt=0, le=1
    )

    @field_validator("k")
    @classmethod
    def _rising(cls, k: list[int]) -> list[int]:
        if min(k) < 1:
            raise ValueError("every k must be 1 or more")
        return sorted(set(k))


class FixedSettings(Settings):
    """Values taken as they are instead of being tuned on the development documents."""

    temperature: float | None = setting(None, "Joint softmax: divides the scores of entries of the window and of long memory.", gt=0)
    bias: float | None = setting(None, "Joint softmax: taken off the scores of long memory.", unit="nats")
    store_temperature: float | None = setting(None, "Joint softmax: divides the scores of the datastore's entries.", gt=0)
    store_bias: float | None = setting(None, "Joint softmax: taken off the scores of the datastore's entries.", unit="nats")
    neighbours: int | None = setting(None, "Nearest entries of the datastore that count.", unit="entries", ge=1)
    knn_temperature: float | None = setting(None, "kNN distribution: divides the scores.", gt=0)
    knn_weight: float | None = setting(None, "kNN distribution: its weight, lambda.", ge=0, lt=1)
    cache_temperature: float | None = setting(None, "Continuous cache: divides the scores.", gt=0)
    cache_weight: float | None = setting(None, "Continuous cache: its weight, lambda.", ge=0, lt=1)

    def given(self) -> dict[str, float]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EvaluateSettings(Settings):
    batch_size: int = setting(32, "Rows a forward pass.", unit="rows", ge=1, result=False)
    max_segments: int | None = setting(None, "Held-out segments to score; default: all.", unit="segments", ge=1)
    latency: LatencySettings = setting(LatencySettings(), "How the speed of dense and pruned model is measured.")
    memory: Annotated[list[str], BeforeValidator(_listed)] = setting(
        [],
        "Memories to test the pretrained causal model with: none, or local, long, external joined by + in one softmax;"
        " baselines: cache, cache+long, knn, knn+cache, knn+cache+long.",
    )
    window: WindowSettings = setting(WindowSettings(), "Memories: how the text is read.")
    within_documents: bool | None = setting(
        None, "Memories: whether windows stop where documents do; default: as rows were cut, false for pack.segments: across."
    )
    long: LongSettings = setting(LongSettings(), "Memories: what was read before the window.")
    external: ExternalSettings = setting(ExternalSettings(), "Memories: how the datastore is searched.")
    datastore: str | None = setting(None, "Memories: another run's datastore, instead of the one that the index stage made.")
    max_document_tokens: int | None = setting(
        None, "Memories: longer held-out documents are cut there, so that no one of them is the result.", unit="tokens", ge=2
    )
    max_tokens: int | None = setting(None, "Memories: held-out tokens used, in whole documents evenly spread; default: all.", unit="tokens", ge=2)
    development: float = setting(0.33, "Memories: share of the held-out documents that values are tuned on; the others are the test.", ge=0, lt=1)
    fixed: FixedSettings = setting(FixedSettings(), "Memories: values that are given, not tuned.")

    @field_validator("memory")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(Memory.of(name).name for name in names))

    @model_validator(mode="after")
    def _some_long(self) -> EvaluateSettings:
        if self.window.context is not None:
            self.check_long(self.window.context)
        return self

    @property
    def memories(self) -> list[Memory]:
        return [Memory.of(name) for name in self.memory]

    @property
    def searches(self) -> bool:
        """Whether some memory needs a datastore."""
        return any("external" in memory for memory in self.memories)

    def windowed(self, row_length: int | None) -> tuple[int, int]:
        """Block and context, in tokens, for rows of so many. Raises ValueError when long memory could hold nothing."""
        block, context = self.window.resolved(row_length)
        self.check_long(context)
        return block, context

    def check_long(self, context: int) -> None:
        if self.long.size <= context and not self.long.keep_duplicates and any("long" in memory for memory in self.memories):
            raise ValueError(
                f"long.size {self.long.size} is not above the window's context of {context} tokens, which holds these entries again, so long memory"
                " would be empty; set a larger evaluate.long.size, a smaller evaluate.window.context, or evaluate.long.keep_duplicates: true"
            )
