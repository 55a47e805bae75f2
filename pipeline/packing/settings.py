"""The `pack` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class BM25Settings(Settings):
    """How `groups: bm25` finds segments that retrieve one another, and what it makes of them."""

    terms: Literal["words", "tokens"] = setting("words", "What is matched: lower-case words, whatever tokens spell them, or token ids.")
    search: Literal["capped", "pruned", "exact"] = setting(
        "capped",
        "Neighbours: exact; pruned: 95 in 100 of them or more; capped: bounded work for each segment, made for grouping large corpora.",
    )
    neighbours: int = setting(20, "Neighbours found for each segment.", unit="segments", ge=1)
    k1: float = setting(0.9, "BM25: how soon repetitions of a term stop counting.", ge=0)
    b: float = setting(0.4, "BM25: how much a long segment is discounted, 0 to 1.", ge=0, le=1)
    max_frequency: float = setting(1.0, "Terms in a larger share of the segments are ignored. Below 1 other neighbours are found.", gt=0, le=1)
    policy: Literal["matching", "chain"] = setting(
        "matching", "matching: groups with the most similarity inside; chain: TRIME's walk from neighbour to neighbour, cut into groups."
    )
    same_document: bool = setting(False, "Whether segments of one document may share a group; TRIME's external memory wants them apart.")
    near_duplicates: Literal["remove", "apart", "keep"] = setting(
        "remove", "Segments nearly the same as an earlier one: left out of the plan, kept out of its group, or treated as any other."
    )
    duplicate_overlap: float = setting(0.8, "Share of words in common (weighted Jaccard) from which two segments are near-duplicates.", gt=0, le=1)
    memory: float = setting(4.0, "What the search may hold on each rank.", unit="GiB", gt=0, result=False)
    threads: int = setting(0, "Threads of each rank, 0 for one a core divided by the ranks here.", ge=0, result=False)


class PackSettings(Settings):
    length: int = setting(128, "Length of a segment as the model sees it, special tokens included.", unit="tokens", ge=8)
    segments: Literal["across", "within", "best_fit"] = setting(
        "across",
        "across: fixed length, running over document ends; within: never crossing one, the last of a document padded;"
        " best_fit: documents are cut only where they are longer than a row, and the pieces packed into rows with little padding.",
    )
    min_tokens: int = setting(8, "Shorter document tails are dropped (segments: within).", unit="tokens", ge=1)
    groups: Literal["random", "consecutive", "bm25"] = setting(
        "random",
        "Which segments share a memory: random ones, consecutive neighbours of one document, or bm25: segments that retrieve one another.",
    )
    group_size: int = setting(1, "Segments in a group.", unit="segments", ge=1)
    mix_documents: bool = setting(False, "Let a consecutive group run on into the next document.")
    bm25: BM25Settings = setting(BM25Settings(), "How groups: bm25 are made.")
    ranks: int = setting(1, "Local MPI ranks.", ge=1, result=False)

    @model_validator(mode="after")
    def _fits(self) -> PackSettings:
        if self.groups != "random" and self.group_size < 2:
            raise ValueError(f"groups: {self.groups} needs group_size of 2 or more")
        if self.groups == "consecutive" and self.segments != "within" and not self.mix_documents:
            raise ValueError("groups: consecutive keeps documents apart; set segments: within, or mix_documents: true")
        if self.groups == "consecutive" and self.segments == "best_fit":
            raise ValueError("segments: best_fit leaves no order for groups: consecutive; set segments: within or across")
        if self.mix_documents and self.groups != "consecutive":
            raise ValueError("mix_documents is about groups: consecutive only")
        return self
