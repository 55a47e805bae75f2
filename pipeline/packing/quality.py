"""How good a plan is: how full its rows are, and what the segments of a group tell about one another, beside a random plan.

The random plan has groups of the same sizes, filled with the same segments in a random order. Of a large plan a random sample of groups is measured.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.artifacts import Artifact
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.packing import terms
from pipeline.packing.bm25 import bags
from pipeline.packing.bm25.bags import Bags
from pipeline.packing.plan import Plan, tokenizer_identity
from pipeline.packing.segments import Ints
from pipeline.packing.terms import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RARE = 0.02
"""Share of the segments up to which a token is rare."""
COUNTED = 200_000
"""Segments that document frequencies are counted in, at most."""
_CHARACTERS = 300
_TERMS = 6


# -- the measures -----------------------------------------------------------------------------------------------------


def pair_scores(bags: Bags, groups: Ints) -> NDArray[np.float32]:
    """float32 [G, m, m]: BM25 of segment i as the query with segment j, NaN where i = j or a group [G, m] is short (-1)."""
    count, size = groups.shape
    scores = np.full((count, size, size), np.nan, dtype=np.float32)
    documents = np.repeat(groups[:, None, :], size, axis=1)
    is_pair = (documents >= 0) & (groups[:, :, None] >= 0) & ~np.eye(size, dtype=bool)
    queries = groups.reshape(-1)
    documents = np.where(is_pair, documents, -1).reshape(-1, size)
    scores.reshape(-1, size)[queries >= 0] = bags.score(queries[queries >= 0], documents[queries >= 0])
    return np.where(is_pair, scores, np.float32(np.nan))


def positives(rows: Rows, groups: Ints, frequency: Ints) -> tuple[float | None, float | None]:
    """Share of tokens, each the target of the token before it, that occur in another segment of the group; the same of rare tokens.

    frequency: int64 [V], of how many rows a token is in; rare are tokens of at most RARE of them.
    """
    rare = frequency <= RARE * (len(rows.offsets) - 1)
    targets, found, rare_targets, rare_found = _positives(rows.terms, rows.offsets, groups, rare)
    return (found / targets if targets else None), (rare_found / rare_targets if rare_targets else None)


def same_document(plan: Plan, groups: Ints) -> float | None:
    """Share of the pairs of segments in a group [G, m] that hold text of one document."""
    shared = [not one.isdisjoint(other) for group in groups for one, other in combinations([_documents(plan, s) for s in group[group >= 0]], 2)]
    return sum(shared) / len(shared) if shared else None


def document_frequency(rows: Rows) -> Ints:
    """int64 [V]: how many rows have each term."""
    return bags.document_frequency(rows.terms, rows.offsets, int(rows.terms.max(initial=-1)) + 1)


def _documents(plan: Plan, segment: int) -> set[int]:
    return set(plan.pieces[plan.segments[segment] : plan.segments[segment + 1], 0].tolist())


@numba.njit(cache=True, nogil=True)
def _positives(tokens, offsets, groups, rare):  # type: ignore[no-untyped-def]
    """Targets, those found, rare targets, those found: a token is found where two members of its group or more have it."""
    targets = found = rare_targets = rare_found = 0
    holders, last = np.zeros(len(rare), dtype=np.int64), np.full(len(rare), -1, dtype=np.int64)
    for number in range(len(groups)):
        for slot, row in enumerate(groups[number]):
            if row >= 0:
                for token in tokens[offsets[row] : offsets[row + 1]]:
                    if last[token] // groups.shape[1] != number:
                        holders[token] = 0
                    if last[token] != number * groups.shape[1] + slot:
                        last[token] = number * groups.shape[1] + slot
                        holders[token] += 1
        for row in groups[number]:
            if row >= 0:
                for token in tokens[offsets[row] + 1 : offsets[row + 1]]:
                    targets += 1
                    found += holders[token] > 1
                    rare_targets += rare[token]
                    rare_found += rare[token] and holders[token] > 1
    return targets, found, rare_targets, rare_found


# -- a plan, measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InGroup:
    """Means over the sampled groups of a plan, or of its random counterpart; None where there is nothing to take the mean of.

    bm25: over ordered pairs of segments in a group. The others: see `positives` and `same_document`.
    """

    bm25: float | None
    positives: float | None
    rare_positives: float | None
    same_document: float | None


@dataclass(frozen=True)
class Member:
    """A segment as a person reads it.

    similarity: mean BM25 with the others of its group, as query and as document; None where it is alone. shared: the terms it has in
    common with them that carry most of it.
    """

    segment: int
    documents: list[int]
    similarity: float | None
    text: str
    shared: list[str]


@dataclass(frozen=True)
class Quality:
    """counts: of all rows and groups. measured: groups in the figures below; counted: segments that document frequencies are of.

    in_group, random: None for groups of one. read: some of the measured groups as text, number and members; of two members or more
    where the plan has such groups.
    """

    plan: Plan
    counts: dict[str, Any]
    measured: int
    counted: int
    seed: int
    in_group: InGroup | None
    random: InGroup | None
    read: list[tuple[int, list[Member]]]

    def figures(self) -> dict[str, Any]:
        """Everything measured, as plain JSON values."""
        return {
            "plan": str(self.plan.directory),
            **self.counts,
            "measured_groups": self.measured,
            "counted_segments": self.counted,
            "seed": self.seed,
            "in_group": self.in_group and asdict(self.in_group),
            "random": self.random and asdict(self.random),
        }


def measure(plan: Plan, store: Store, tokenizer: PreTrainedTokenizerFast, *, sample: int = 2000, seed: int = 1, read: int = 0) -> Quality:
    """sample: groups measured, at most. seed: of the sample and of the random plan. read: groups given as text.

    Reads the sampled segments and, for document frequencies, others up to COUNTED.
    """
    draw = np.random.Generator(np.random.Philox(seed))
    numbers = draw.permutation(len(plan.groups))[:sample]
    order = draw.permutation(plan.groups[plan.groups >= 0])
    groups = plan.groups[numbers]
    shuffled = np.full_like(groups, -1)
    shuffled[groups >= 0] = order[: (groups >= 0).sum()]
    described = ("tokens", "dropped_tokens", "padded_tokens", "fill_rate", "duplicates", "met_but_should_not")
    counts = {
        "segments": len(plan.segments) - 1,
        "groups": len(plan.groups),
        "group_size": plan.group_size,
        "short_groups": int((plan.groups < 0).any(axis=1).sum()),
        **{name: plan.description[name] for name in described if name in plan.description},
    }
    if plan.group_size == 1:
        alone = [(number, [_member(plan, int(plan.groups[number, 0]), store, tokenizer)]) for number in numbers[:read].tolist()]
        return Quality(plan, counts, 0, 0, seed, None, None, alone)
    segments = np.unique(np.concatenate([groups[groups >= 0], shuffled[shuffled >= 0], order[:COUNTED]]))
    found = _Terms.of(plan, segments, store, tokenizer)
    tokens = found.rows if plan.settings.bm25.terms == "tokens" else _rows(plan, segments, store, tokenizer, "tokens")
    frequency = document_frequency(tokens)

    def in_group(groups: Ints) -> InGroup:
        own = np.where(groups >= 0, np.searchsorted(segments, groups), -1)
        scores = pair_scores(found.bags, own)
        mean = float(np.nanmean(scores, dtype=np.float64)) if np.isfinite(scores).any() else None
        return InGroup(mean, *positives(tokens, own, frequency), same_document(plan, groups))

    several = numbers[(groups >= 0).sum(axis=1) > 1][:read].tolist()
    readable = [(number, _read(plan, number, store, tokenizer, found)) for number in several]
    return Quality(plan, counts, len(groups), len(segments), seed, in_group(groups), in_group(shuffled), readable)


def _rows(plan: Plan, segments: Ints, store: Store, tokenizer: PreTrainedTokenizerFast, kind: Literal["words", "tokens"]) -> Rows:
    starts, counts = plan.segments[segments], np.diff(plan.segments)[segments]
    ends = np.cumsum(counts)
    pieces = plan.pieces[np.repeat(starts - ends + counts, counts) + np.arange(counts.sum())]
    return terms.rows(pieces, np.append(0, ends), store, tokenizer, kind)


# -- groups as text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Terms:
    """The terms of some segments of a plan: row i of `rows` and bag i are those of segment segments[i]."""

    segments: Ints
    rows: Rows
    bags: Bags
    idf: NDArray[np.float64]

    @classmethod
    def of(cls, plan: Plan, segments: Ints, store: Store, tokenizer: PreTrainedTokenizerFast) -> _Terms:
        settings = plan.settings.bm25
        rows = _rows(plan, segments, store, tokenizer, settings.terms)
        frequency = document_frequency(rows)
        idf = np.log1p((len(segments) - frequency + 0.5) / (frequency + 0.5))
        return cls(segments, rows, Bags.of_flat(rows.terms, rows.offsets, k1=settings.k1, b=settings.b), idf)

    def row(self, at: int) -> list[int]:
        return self.rows.terms[self.rows.offsets[at] : self.rows.offsets[at + 1]].tolist()


def _read(plan: Plan, number: int, store: Store, tokenizer: PreTrainedTokenizerFast, found: _Terms) -> list[Member]:
    """The members of a group, with what makes them similar."""
    group = plan.groups[number][plan.groups[number] >= 0]
    own = np.searchsorted(found.segments, group)
    scores = pair_scores(found.bags, own[None])[0]
    names: dict[int, str] = {}
    for segment, at in zip(group.tolist(), own.tolist(), strict=True):
        names |= _names(plan, segment, store, tokenizer, found.row(at))
    counts = [Counter(found.row(at)) for at in own]
    members = []
    for i, segment in enumerate(group.tolist()):
        others = [(counts[j], found.bags.norms[own[j]]) for j in range(len(group)) if j != i]
        weights = {
            term: count * found.idf[term] * sum(other[term] / (other[term] + norm) for other, norm in others if term in other)
            for term, count in counts[i].items()
            if term in names
        }
        shared = sorted((term for term in weights if weights[term] > 0), key=lambda term: (-weights[term], term))[:_TERMS]
        similarity = float(np.nanmean([scores[i], scores[:, i]]))
        members.append(_member(plan, segment, store, tokenizer, similarity, [names[term] for term in shared]))
    return members


def _names(plan: Plan, segment: int, store: Store, tokenizer: PreTrainedTokenizerFast, row: list[int]) -> dict[int, str]:
    """How the terms of a segment are written."""
    if plan.settings.bm25.terms == "tokens":
        return {token: name for token in set(row) if (name := str(tokenizer.decode([token])).strip())}
    spelt = [word for text in _texts(plan, segment, store, tokenizer) for word in terms.words(text)]
    # A decoder may join what the tokens keep apart; then the words are not told by their places.
    return dict(zip(row, spelt, strict=True)) if len(row) == len(spelt) else {}


def _texts(plan: Plan, segment: int, store: Store, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    pieces = plan.pieces[plan.segments[segment] : plan.segments[segment + 1]].tolist()
    return [str(tokenizer.decode(store.read(*piece).tolist(), skip_special_tokens=True)) for piece in pieces]


def _member(
    plan: Plan, segment: int, store: Store, tokenizer: PreTrainedTokenizerFast, similarity: float | None = None, shared: Sequence[str] = ()
) -> Member:
    text = " ¶ ".join(" ".join(text.split()) for text in _texts(plan, segment, store, tokenizer))
    inside = "…" if plan.pieces[plan.segments[segment], 1] > 0 else ""
    text = inside + (text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS].rsplit(' ', 1)[0]}…")
    return Member(segment, sorted(_documents(plan, segment)), similarity, text, list(shared))


# -- where a plan is --------------------------------------------------------------------------------------------------


def open_plan(directory: Path, store: Path | None = None, tokenizer: Path | None = None) -> tuple[Plan, Store, PreTrainedTokenizerFast]:
    """A plan with the token store and the tokenizer it was made of, found through the manifest of its artifact unless given.

    directory: a plan, or an artifact of pack, whose train/ is taken.
    Raises UserError when there is no plan, it is empty, or store or tokenizer are missing or others.
    """
    place = next((place for place in (directory, directory / "train") if (place / "plan.json").is_file()), None)
    if place is None:
        what = "no plan here (neither plan.json nor train/plan.json)" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: {what}; give what pack made, such as runs/NAME/pack-1234abcd, or a recipe")
    plan = Plan.open(place)
    if len(plan.groups) == 0:
        raise UserError(f"{place}: the plan has no segments, so there is nothing to inspect")
    if store is None or tokenizer is None:
        tokenize = _tokenize_directory(place.resolve())
        store, tokenizer = store or tokenize / place.resolve().name, tokenizer or tokenize / "tokenizer"
    opened, loaded = Store.open(store), _tokenizer(tokenizer, plan)
    plan.check(opened, loaded)
    return plan, opened, loaded


def _tokenize_directory(place: Path) -> Path:
    remedy = "give --store DIR and --tokenizer DIR"
    if not (place.parent / artifacts.MANIFEST).is_file():
        raise UserError(f"{place}: not inside what pack made, so its token store is not known; {remedy}")
    digest = Artifact.open(place.parent).manifest["inputs"].get("tokenize", "")
    found = artifacts.find(place.parent.parent, "tokenize", digest)
    if found is None:
        raise UserError(f"{place}: the token store it was made of, {place.parent.parent / f'tokenize-{digest[:8]}'}, is not there; {remedy}")
    return found.path


def _tokenizer(directory: Path, plan: Plan) -> PreTrainedTokenizerFast:
    """What `tokenizers.load` gives; where the plain class reads the same, without AutoTokenizer, which takes seconds to import torch."""
    from transformers import PreTrainedTokenizerFast

    with contextlib.suppress(Exception):  # whatever it cannot read, `load` reads, or says why not
        plain = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        if tokenizer_identity(plain) == plan.description["tokenizer"]:
            return plain
    return tokenizers.load(directory)
