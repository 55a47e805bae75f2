"""Adaptive input embeddings and adaptive softmax (Baevski and Auli 2019; Grave et al. 2017): very large vocabularies in narrow tables.

Token ids fall in frequency and are cut into bands. Band b, of n words, has a table [n, w] with w = d / factor**b, and a projection [d, w].
The softmax chooses among the words of the first band and one cluster for each further band (a tail), then among the tail's words. Depends on
torch alone, because it travels with exported models.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def bands(hidden_size: int, vocab_size: int, cutoffs: list[int], factor: int) -> list[tuple[int, int, int]]:
    """(first id, id after the last, width) of each band. d = 16, 10 words, cutoffs [4], factor 4: (0, 4, 16), (4, 10, 4).

    Raises ValueError when the cutoffs do not rise between 0 and the vocabulary, or a band would have no width.
    """
    bounds = [0, *cutoffs, vocab_size]
    if any(start >= end for start, end in pairwise(bounds)):
        raise ValueError(f"adaptive cutoffs {list(cutoffs)} do not cut a vocabulary of {vocab_size} words: they rise, and lie between 0 and its size")
    if hidden_size < factor ** len(cutoffs):
        raise ValueError(f"adaptive factor {factor} leaves the last of {len(cutoffs) + 1} bands no width: the model is {hidden_size} wide")
    return [(start, end, hidden_size // factor**band) for band, (start, end) in enumerate(pairwise(bounds))]


class AdaptiveEmbedding(nn.Module):
    """Input embeddings of each band, projected to the width of the model.

    Tables are drawn with variance 1 / w and projections Xavier-uniform, so that the vectors of every band are of about one size. Parameters are
    the module's own, not a child's, which is how ZeRO-3 gathers them where they are used.
    """

    projection_0: nn.Parameter

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: list[int], factor: int):
        super().__init__()
        self.bands = bands(hidden_size, vocab_size, cutoffs, factor)
        self.hidden_size = hidden_size
        for band, (start, end, width) in enumerate(self.bands):
            self.register_parameter(f"table_{band}", nn.Parameter(torch.randn(end - start, width) * width**-0.5))
            self.register_parameter(f"projection_{band}", nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_size, width))))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., d]."""
        embedded = self.projection_0.new_zeros(*input_ids.shape, self.hidden_size)
        for band, (start, end, _) in enumerate(self.bands):
            inside = (input_ids >= start) & (input_ids < end)
            vectors = F.embedding(input_ids[inside] - start, getattr(self, f"table_{band}"))
            embedded[inside] = F.linear(vectors, getattr(self, f"projection_{band}")).to(embedded.dtype)
        return embedded


class AdaptiveHead(nn.Module):
    """The adaptive softmax on tables that are the input's (`tied`). A word of a tail scores its cluster's score plus its log probability there.

    Its log partition is that of the first band's words and the clusters alone, so whatever else competes with the vocabulary (TRIME's
    memories) meets scores on their raw scale (Zhong et al. 2022). dropout: on the hidden state, and on its projection to a tail.
    """

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: list[int], factor: int, tie_projections: bool, dropout: float):
        super().__init__()
        (_, first, _), *tails = self.bands = bands(hidden_size, vocab_size, cutoffs, factor)
        self.tie_projections = tie_projections
        self.dropout = dropout
        self.table_0 = nn.Parameter(torch.empty(first, hidden_size))
        self.clusters = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(tails), hidden_size))) if tails else None
        for tail, (start, end, width) in enumerate(tails, start=1):
            projection = torch.empty(hidden_size, width)
            self.register_parameter(f"table_{tail}", nn.Parameter(torch.empty(end - start, width)))
            self.register_parameter(f"projection_{tail}", nn.Parameter(projection if tie_projections else nn.init.xavier_uniform_(projection)))

    def tied(self, head: str, embedding: str) -> dict[str, str]:
        """Full name of each parameter that is the input embedding's -> its name there; head, embedding: names of the two modules."""
        names = [f"table_{band}" for band in range(len(self.bands))]
        names += [f"projection_{tail}" for tail in range(1, len(self.bands))] if self.tie_projections else []
        return {f"{head}.{name}": f"{embedding}.{name}" for name in names}

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the labels [...] of hidden [..., d] that are not -100; 0, with a gradient of 0, where there are none."""
        labelled = labels != -100
        partition, score = self(hidden[labelled], labels[labelled])
        return (partition - score).sum() / labelled.sum().clamp(min=1)

    def scores(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """hidden [N, d], targets int64 [N] -> log partition and score of the target [N], in fp32 at least; their difference is the cross-entropy.

        A tail is computed for the rows that have a target in it. chunk: rows of scores held at a time, computed again in the backward pass,
        where each chunk makes a gradient of every table: a few large chunks are quicker than many small ones.
        """
        return self(hidden, targets, chunk)  # through the call, where ZeRO-3 gathers the parameters

    def forward(self, hidden: Tensor, targets: Tensor | None = None, chunk: int | None = None) -> Any:
        """Scores of the whole vocabulary, fp32 [..., V], whose log sum exp is the partition; with targets as `scores` says."""
        if targets is None:
            return self._all(hidden)
        if chunk is None:
            return self._scores(hidden, targets)
        parts = [checkpoint(self._scores, *rows, use_reentrant=False) for rows in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
        partitions, found = zip(*parts, strict=True)
        return torch.cat(partitions), torch.cat(found)

    def _all(self, hidden: Tensor) -> Tensor:
        hidden = F.dropout(hidden, self.dropout, self.training)
        parts = [_wide(F.linear(hidden, self.table_0))]
        if self.clusters is not None:
            clusters = _wide(F.linear(hidden, self.clusters))
            parts += [clusters[..., tail - 1, None] + self._tail(hidden, tail).log_softmax(-1) for tail in range(1, len(self.bands))]
        return torch.cat(parts, dim=-1)

    def _scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.dropout(hidden, self.dropout, self.training)
        words = _wide(F.linear(hidden, self.table_0))
        partition = words.logsumexp(1)
        score = words.gather(1, targets.clamp(max=len(self.table_0) - 1)[:, None]).squeeze(1)
        if self.clusters is None:
            return partition, score
        clusters = _wide(F.linear(hidden, self.clusters))
        for tail, (start, end, _) in enumerate(self.bands[1:], start=1):
            inside = (targets >= start) & (targets < end)  # where none is, the empty product still gives the tail a gradient, of 0
            lost = F.cross_entropy(self._tail(hidden[inside], tail), targets[inside] - start, reduction="none")
            score = score.masked_scatter(inside, clusters[inside, tail - 1] - lost)
        return torch.logaddexp(partition, clusters.logsumexp(1)), score

    def _tail(self, hidden: Tensor, tail: int) -> Tensor:
        narrow = F.dropout(hidden @ getattr(self, f"projection_{tail}"), self.dropout, self.training)
        return _wide(F.linear(narrow, getattr(self, f"table_{tail}")))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
