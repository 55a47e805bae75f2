"""The memories a language model can be tested with, by their names in a recipe: parts joined by `+`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Part = Literal["local", "long", "external"]

JOINT: dict[str, tuple[Part, ...]] = {
    "none": (),
    "local": ("local",),
    "long": ("long",),
    "external": ("external",),
    "local+long": ("local", "long"),
    "local+external": ("local", "external"),
    "long+external": ("long", "external"),
    "local+long+external": ("local", "long", "external"),
}
"""One softmax over vocabulary and entries (TRIME; Zhong et al. 2022, Eq. 6)."""

LINEAR: dict[str, tuple[Part, ...]] = {
    "cache": ("local",),
    "cache+long": ("local", "long"),
    "knn": ("external",),
    "knn+cache": ("local", "external"),
    "knn+cache+long": ("local", "long", "external"),
}
"""A weighted mean of distributions: the continuous cache (Grave et al. 2017) and kNN-LM (Khandelwal et al. 2020)."""

INTERPOLATED = ", interpolated"


@dataclass(frozen=True)
class Memory:
    """parts: where its entries are. rule: how they meet the vocabulary; `interpolated` is joint, then mixed with the store's own
    distribution (TRIME, Eq. 7)."""

    name: str
    parts: tuple[Part, ...]
    rule: Literal["joint", "interpolated", "linear"]

    @classmethod
    def of(cls, name: str) -> Memory:
        """The memory of that name, its parts in any order. Raises ValueError for any other."""
        words = frozenset(name.split("+"))
        for known, rule in ((JOINT, "joint"), (LINEAR, "linear")):
            for title, parts in known.items():
                if frozenset(title.split("+")) == words and name.count("+") == title.count("+"):
                    return cls(title, parts, "joint" if rule == "joint" else "linear")
        raise ValueError(f"no memory is called {name!r}; one softmax: {', '.join(JOINT)}; baselines: {', '.join(LINEAR)}")

    def interpolated(self) -> Memory:
        """A joint memory with a store, mixed once more with the store's own distribution."""
        assert self.rule == "joint"
        assert "external" in self.parts
        return replace(self, name=f"{self.name}{INTERPOLATED}", rule="interpolated")

    @property
    def joint(self) -> str:
        """The name of the joint memory that an interpolated one adds to."""
        return self.name.removesuffix(INTERPOLATED)

    def __contains__(self, part: Part) -> bool:
        return part in self.parts
