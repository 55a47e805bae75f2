"""The `tokenize` section of a recipe, and what a specification in tokenizers/ says."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class Source(Settings):
    """Where documents come from: exactly one of `embedded`, `path`, `hub`. A bare string is a path, or `embedded`."""

    embedded: bool = setting(False, "Docstrings of the standard library and of the installed dependencies.")
    path: str | None = setting(
        None,
        "File or glob of .jsonl, .txt, .tokens (WikiText), .csv or .parquet, also .gz; blank lines part documents in .txt, titles in .tokens.",
    )
    hub: str | None = setting(None, "Name of a dataset on the Hugging Face hub.")
    subset: str | None = setting(None, "Configuration of the hub dataset.")
    split: str = setting("train", "Split of the hub dataset.")
    text: str = setting("text", "Name of the column that holds a document's text.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"embedded": True} if value == "embedded" else {"path": value}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if sum([self.embedded, self.path is not None, self.hub is not None]) != 1:
            raise ValueError("give exactly one of embedded, path, hub")
        return self


class TokenizeSettings(Settings):
    sources: tuple[Source, ...] = setting((Source(embedded=True),), "Where documents come from.", min_length=1)
    tokenizer: str = setting(
        "unigram", "Name of a specification in tokenizers/, a .yaml specification, a SentencePiece .model or a Hugging Face tokenizer directory."
    )
    vocab_size: int | None = setting(None, "Size of a trained vocabulary; default: the specification's.", unit="tokens", gt=8)
    min_characters: int = setting(32, "Shorter documents are dropped.", unit="characters", ge=1)
    deduplicate: float | None = setting(
        0.8, "Documents whose estimated 5-word-shingle Jaccard similarity to an earlier one reaches this are dropped; null keeps all.", gt=0, le=1
    )
    validation: float = setting(0.01, "Share of documents held out, drawn by document hash.", ge=0, lt=1)
    validation_sources: tuple[Source, ...] = setting((), "Held-out documents from their own sources; `validation` must then be 0.")
    shard_megabytes: int = setting(64, "Text per shard: the unit of parallel work and of resuming.", unit="MB", ge=1)
    ranks: int = setting(1, "Local MPI ranks.", ge=1, result=False)

    @model_validator(mode="after")
    def _one_held_out(self) -> TokenizeSettings:
        if self.validation_sources and self.validation:
            raise ValueError("validation_sources replaces validation: set validation to 0")
        return self


class Specification(Settings):
    """A tokenizer to train. Text is not normalised: whatever is encoded comes back byte for byte (but U+2581, SentencePiece's sign for a space).

    What the vocabulary does not cover, newlines among it, is written as UTF-8 bytes, one token each. The kind `words` is another matter:
    it splits text that is tokenised already, see `pipeline.corpus.words`.
    """

    kind: Literal["unigram", "bpe", "bytes", "words"] = setting(
        ..., "unigram and bpe: SentencePiece; bytes: the 256 bytes, without training; words: between spaces, most frequent first."
    )
    vocab_size: int | None = setting(
        8000, "Size of the vocabulary, 5 special tokens and 256 bytes included; null, for words: all there are. Not for bytes.", unit="tokens", gt=261
    )
    character_coverage: float = setting(0.9995, "Share of the sample's characters that get a piece of their own.", gt=0, le=1)
    sample_megabytes: int | None = setting(8, "Training text, drawn from the training documents; null: all of them.", unit="MB", ge=1)

    @model_validator(mode="after")
    def _sized(self) -> Specification:
        if self.vocab_size is None and self.kind in ("unigram", "bpe"):
            raise ValueError(f"a tokenizer of kind {self.kind} needs a vocab_size; null is for words")
        return self
