"""The plan: which tokens make a row and which rows share a memory. It points into the token store and copies nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline import artifacts
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.packing import groups, order, segments
from pipeline.packing.related import Related, related
from pipeline.packing.segments import Ints, Segments
from pipeline.packing.settings import PackSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.corpus.store import Store

FORMAT = 1
ARRAYS = ("pieces", "segments", "groups")
Kind = Literal["encoder", "decoder"]
SPECIALS: dict[str, tuple[str, ...]] = {"encoder": ("cls", "sep"), "decoder": ()}
"""Special tokens of a row: one before and one after an encoder's tokens, none in a decoder's."""


@dataclass(frozen=True)
class Plan:
    """pieces: int64 [P, 3] (document, start, length); segments: int64 [N + 1] offsets into pieces; groups: int64 [G, m] segment
    numbers, -1 where a group is short. The arrays are memory maps; `description` is plan.json.
    """

    directory: Path
    description: dict[str, Any]
    settings: PackSettings
    pieces: Ints
    segments: Ints
    groups: Ints

    @classmethod
    def open(cls, directory: str | Path) -> Plan:
        """Raises UserError when a file is missing, is not what plan.json says, or was made by another version."""
        directory = Path(directory)
        remedy = "run pack again (remove its directory first)"
        try:
            description = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
            if description["format"] != FORMAT:
                raise UserError(f"{directory / 'plan.json'}: format {description['format']!r}, this Trimline reads {FORMAT}; {remedy}")
            settings = PackSettings.model_validate(description["settings"])
            shapes = {name: tuple(description["arrays"][name]["shape"]) for name in ARRAYS}
            _ = SPECIALS[description["kind"]], description["store"], description["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split("\n")[:3])
            raise UserError(f"{directory / 'plan.json'}: not a readable plan ({type(error).__name__}: {reason}); {remedy}") from None
        arrays = {}
        for name in ARRAYS:
            file = directory / f"{name}.npy"
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{file}: not a readable array ({error}); {remedy}") from None
            if array.dtype != np.int64 or array.shape != shapes[name]:
                raise UserError(f"{file}: {array.dtype} {array.shape}, plan.json says int64 {shapes[name]}; {remedy}")
            arrays[name] = np.asarray(array)  # a plain view: memmap arithmetic makes memmaps
        return cls(directory, description, settings, **arrays)

    @property
    def kind(self) -> Kind:
        return self.description["kind"]

    @property
    def length(self) -> int:
        """Tokens of a row, special tokens included."""
        return self.settings.length

    @property
    def tokens_per_row(self) -> int:
        return self.length - len(SPECIALS[self.kind])

    @property
    def group_size(self) -> int:
        return self.settings.group_size

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of plan.json, which holds those of the arrays."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def order(self, seed: int, epoch: int) -> Ints:
        """int64 [G]: the permutation of groups of that epoch."""
        return order.permutation(len(self.groups), seed, epoch)

    def check(self, store: Store, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises UserError when the plan was made of another token store or with another tokenizer."""
        for what, found in (("tokenizer", tokenizer_identity(tokenizer)), ("store", store.fingerprint())):
            made_with = self.description[what]
            if made_with != found:
                name = {"tokenizer": "tokenizer", "store": "token store"}[what]
                raise UserError(
                    f"{self.directory / 'plan.json'}: the plan was made with {name} {made_with[:8]}, this is {name} {found[:8]};"
                    f" use the {name} that tokenize made for it, or run pack again"
                )


def make(
    directory: str | Path,
    settings: PackSettings,
    kind: Kind,
    store: Store | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    ranks: Ranks | None = None,
    scratch: Path | None = None,
) -> Plan:
    """Cut the store into rows, group them, and write the plan into `directory`, plan.json last. Every rank gets it; the first writes.

    store: None for a split without documents, whose plan is empty. seed: of random groups, and of the chain policy's walk.
    scratch: where the search for neighbours keeps what is finished, by default beside the plan; all ranks must see it.
    Raises UserError when the tokenizer lacks a special token that rows need, or BM25 gets too little memory.
    """
    directory, ranks = Path(directory), ranks or Ranks()
    missing = [role for role in SPECIALS[kind] if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise UserError(f"the tokenizer has no {' and no '.join(missing)} token, which an encoder's rows need; use another tokenizer, or a decoder")
    tokens_per_row = settings.length - len(SPECIALS[kind])
    cut = _cut(settings, np.empty(0, dtype=np.int64) if store is None else store.lengths, tokens_per_row)
    if settings.groups == "bm25" and store is not None:
        found = related(cut, store, tokenizer, settings.group_size, settings.bm25, seed, ranks, scratch or directory / "scratch")
        if ranks.first:
            _write(directory, settings, kind, store, tokenizer, cut, found)
    elif ranks.first:
        size, count = settings.group_size, len(cut.offsets) - 1
        if settings.groups == "consecutive":
            grouped = groups.consecutive(cut.documents, size, mix_documents=settings.mix_documents)
        else:
            grouped = groups.random(count, size, seed)
        _write(directory, settings, kind, store, tokenizer, cut, Related(grouped, np.zeros(count, dtype=np.bool_), {}))
    ranks.barrier()
    return Plan.open(directory)


def _write(
    directory: Path,
    settings: PackSettings,
    kind: Kind,
    store: Store | None,
    tokenizer: PreTrainedTokenizerFast,
    cut: Segments,
    related: Related,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    arrays = dict(zip(ARRAYS, (cut.pieces, cut.offsets, related.groups), strict=True))
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array.astype(np.int64, copy=False), allow_pickle=False)
    tokens_until = np.append(0, np.cumsum(cut.pieces[:, 2]))
    unused = int(np.diff(tokens_until[cut.offsets])[related.removed].sum())
    tokens, room = int(tokens_until[-1]) - unused, related.groups.size * (settings.length - len(SPECIALS[kind]))
    description = {
        "format": FORMAT,
        "settings": artifacts.results_only(settings),
        "kind": kind,
        "special_tokens": SPECIALS[kind],
        "store": "none" if store is None else store.fingerprint(),
        "tokenizer": tokenizer_identity(tokenizer),
        "arrays": {name: {"shape": array.shape, "sha256": artifacts.sha256(directory / f"{name}.npy")} for name, array in arrays.items()},
        "tokens": tokens,
        "dropped_tokens": cut.dropped + unused,
        "padded_tokens": room - tokens,
        "fill_rate": tokens / room if room else 0.0,
        **related.found,
    }
    artifacts.write_json(directory / "plan.json", description)


def _cut(settings: PackSettings, lengths: Ints, tokens_per_row: int) -> Segments:
    if settings.segments == "within":
        return segments.within(lengths, tokens_per_row, settings.min_tokens)
    return (segments.best_fit if settings.segments == "best_fit" else segments.across)(lengths, tokens_per_row)


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the vocabulary and of the special tokens' roles: what gives a token id its meaning."""
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")}
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), roles]).encode()).hexdigest()
