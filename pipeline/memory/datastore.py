"""The external memory: keys and values of a corpus on disk, and the search among them.

An entry's key is the memory state of a model at a place of the text, its value the token at the place (`reading`). kNN-LM
(Khandelwal et al. 2020) and TRIME (Zhong et al. 2022, section 3.3) look up the k entries nearest to the state they are at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.memory import description, nearest, quantiser
from pipeline.memory.description import Description
from pipeline.memory.quantiser import Projection
from pipeline.memory.shards import Shards

CANDIDATES = 2
"""Entries scored exactly for each one asked for, where keys are kept."""
LEAST_CANDIDATES = 256
PROBE = 32
"""Lists that a query visits, unless `Datastore.probe` is set."""
_ATTEMPTS = 3


class Datastore:
    """An open datastore. `probe`: lists that a query visits, which may be set.

    Keys and values stay on disk; of kind ivfpq the lists are held in memory, 8 bytes and the code of each entry. A document that is
    removed while the store is open is not found from then on (on the same machine); one that is added is found by those who open it anew.
    """

    def __init__(self, directory: Path, about: Description, shards: Shards, index: Any | None, projection: Projection | None):
        self.directory = directory
        self.description = about
        self._shards = shards
        self._index = index
        self._projection = projection
        self.probe = PROBE

    @classmethod
    def open(cls, directory: str | Path) -> Datastore:
        """The datastore of a directory, or of an index stage's artifact; a change that was cut off is completed first.

        Raises UserError naming the file that is missing, truncated or of another format.
        """
        place = description.locate(directory)
        for attempt in range(_ATTEMPTS):
            description.complete(place)
            about = description.read(place)
            try:
                description.check_sizes(place, about)
                return cls._open(place, about)
            except UserError:
                changed = (place / description.INTENT).is_file() or description.read(place)["revision"] != about["revision"]
                if not changed or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    @classmethod
    def _open(cls, place: Path, about: Description) -> Datastore:
        shards = Shards.open(place, about)
        if about["kind"] == "flat":
            return cls(place, about, shards, None, None)
        index = quantiser.merge([description.shard(place, number) / "part.faiss" for number in range(len(about["shards"]))])
        return cls(place, about, shards, index, Projection.open(place / "projection.npz"))

    def __len__(self) -> int:
        """Entries that have not been removed."""
        return int(self.description["entries"])

    @property
    def metric(self) -> str:
        """`ip` or `l2`."""
        return str(self.description["metric"])

    @property
    def kind(self) -> str:
        """`flat` or `ivfpq`."""
        return str(self.description["kind"])

    @property
    def dimensions(self) -> int:
        """d, of a key as the model made it."""
        return int(self.description["dimensions"])

    @property
    def encoder(self) -> Path | None:
        """Directory of the smaller model whose states are keys and queries; None: the model's own are."""
        model = self.description["model"]
        return Path(model["path"]) if model["encoder"] else None

    @property
    def memory_module(self) -> str | None:
        """Module whose input the keys are, where the recipe named it; what a `CausalReader` of the key model takes."""
        return self.description["model"]["memory_module"]

    @property
    def revision(self) -> str:
        """Hash of the contents."""
        return str(self.description["revision"])

    def check(self, model_fingerprint: str, tokenizer_fingerprint: str) -> None:
        """Raises UserError when the keys are another model's, or the values another tokenizer's.

        model_fingerprint: `models.identity.fingerprint` of the model that makes the queries (the encoder, where there is one);
        tokenizer_fingerprint: `packing.plan.tokenizer_identity`.
        """
        for what, found, made_with in (
            ("model", model_fingerprint, self.description["model"]["fingerprint"]),
            ("tokenizer", tokenizer_fingerprint, self.description["tokenizer"]),
        ):
            if found != made_with:
                raise UserError(
                    f"{self.directory / description.NAME}: the keys were made with {what} {made_with[:8]}, this is {what} {found[:8]}; "
                    f"use the {what} it was made with ({self.description['model']['path']}), or index the documents with this one"
                )

    def search(self, queries: Tensor, k: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The k nearest entries of each query, in one search for all: queries float32 [n, d] -> scores float32 [n, k], falling, values int64 [n, k].

        A score is <q, key> / sqrt(d), or -|q - key|^2 / (2 sqrt(d)); exact where keys are kept, else what their codes say. Where fewer
        entries are found the score is -inf and the value -1.
        exact: every kept key is scored, for measuring; raises UserError where they were dropped.
        """
        asked = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        assert asked.shape[1] == self.dimensions, f"queries of {asked.shape[1]} dimensions, keys of {self.dimensions}"
        if exact and not self._shards.keys:
            raise UserError(f"{self.directory}: its keys were dropped, which an exact search needs; index again with index.keep_keys=true")
        if exact or self._index is None:
            scores, entries = nearest.exact(asked, self._shards, k, self.metric)
            values = self._shards.values_of(entries)
        else:
            scores, values = self._approximate(asked, k)
        return torch.from_numpy(np.where(values < 0, nearest.NONE, scores)), torch.from_numpy(values)

    def _approximate(self, queries: nearest.Floats, k: int) -> tuple[nearest.Floats, nearest.Ints]:
        assert self._index is not None
        assert self._projection is not None
        self._index.nprobe = min(self.probe, self._index.nlist)
        count = max(CANDIDATES * k, LEAST_CANDIDATES) if self._shards.keys else k
        distances, entries = self._index.search(self._projection.queries(queries), min(count, len(self._shards)))
        if self._shards.keys:
            return nearest.best(*nearest.rescored(queries, self._shards, entries, self.metric, faiss.omp_get_max_threads()), k)
        values = self._shards.values_of(entries)
        similarity = self._projection.similarity(queries, distances)
        scores = np.where(values < 0, nearest.NONE, nearest.scale(similarity, self.metric, self.dimensions))
        return nearest.best(scores, values, k)
