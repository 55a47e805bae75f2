"""The embedded corpus: documentation strings that every installation has, and the labelled task that falls out of them.

A document is a module, class or function of the standard library or of an installed dependency (`sources.EMBEDDED_PACKAGES`): qualified
name, header line, docstring. Sources are parsed, never imported. The same versions of Python and packages give the same corpus.

The task: which package does this docstring come from, given the docstring alone. A tenth of all modules, drawn by the hash of their
name, are held out: half are the task's dev split, half its test split. A held-out module's documents never enter pretraining's train
split; they are its validation split.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from pipeline.corpus.duplicates import Duplicates
from pipeline.corpus.sources import EMBEDDED_PACKAGES

TASK_PACKAGES = ("python", "torch", "transformers", "numpy", "scipy", "sklearn", "pandas", "networkx")
"""The labels of the task. `python` is the standard library."""
TASK_EXAMPLES = {"test": 100, "dev": 100, "train": 1000}
"""Most examples of a label in each split."""
TASK_CHARACTERS = 80
"""Shorter docstrings say too little to be examples."""
_SIMILAR = 0.8
"""Estimated Jaccard similarity from which an example is a near-duplicate of another."""

_LEFT_OUT = {
    *("tests", "test", "testing", "_vendor", "_vendored", "vendored", "externals", "site-packages", "dist-packages", "idlelib", "lib2to3"),
    *("array_api_compat", "array_api_extra", "_inductor", "_dynamo", "_functorch", "onnx", "ao"),
}
"""Folders of tests and of other projects' code, and those of torch with much code and little text."""
_LEFT_OUT_BELOW = ("transformers/models",)
"""Model files repeat one another's docstrings nearly word for word."""
_SPARSE = 4000
"""Bytes of source a docstring. Files with fewer docstrings take a third of the time to parse and give a sixth of the text: left out."""


@dataclass(frozen=True)
class Entry:
    """One documented module, class or function."""

    package: str
    module: str
    name: str
    """Within the module; empty for the module itself."""
    header: str
    """`def norm(x, ord=None):` or `class Linear(Module):`; empty for a module."""
    docstring: str

    @property
    def qualified_name(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def document(self) -> str:
        """The text that a language model is trained on."""
        return "\n".join(filter(None, (self.qualified_name, self.header, self.docstring)))


def entries(packages: Iterable[str] = ("python", *EMBEDDED_PACKAGES)) -> Iterator[Entry]:
    """Every entry, in the order of package, file and line: those of held-out modules, then the others, without docstrings that were
    held out word for word. Other near-duplicates are still among them; the first of them is then the held-out one."""
    found = [(package, *module) for package in packages for module in modules(package)]
    held_out: set[str] = set()
    for package, module, file in found:
        if split_of(module) != "train":
            for entry in read_module(package, module, file):
                held_out.add(entry.docstring)
                yield entry
    for package, module, file in found:
        if split_of(module) == "train":
            yield from (entry for entry in read_module(package, module, file) if entry.docstring not in held_out)


def modules(package: str) -> list[tuple[str, Path]]:
    """(module name, file) of a package, sorted; none where it is not installed."""
    root, prefix = _root(package)
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root.parent if prefix else root)
        if _LEFT_OUT.isdisjoint(path.parts) and not path.as_posix().startswith(_LEFT_OUT_BELOW):
            parts = path.with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), file))
    return found


def read_module(package: str, module: str, file: Path) -> Iterator[Entry]:
    """The entries of one source file; none where it has hardly any, or cannot be parsed (templates, files for another Python)."""
    try:
        source = file.read_text(encoding="utf-8")
        if source.count('"""') // 2 * _SPARSE < len(source):
            return
        with warnings.catch_warnings():  # invalid escapes in other people's strings
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    lines = source.splitlines()
    if docstring := ast.get_docstring(tree):
        yield Entry(package, module, "", "", docstring)
    yield from _documented(tree, package, module, "", lines)


def split_of(module: str) -> str:
    """`train`, `dev` or `test`: 18, 1 and 1 of twenty modules, by the hash of their name."""
    return {0: "test", 1: "dev"}.get(_hash(module) % 20, "train")


def task_splits(seed: int) -> dict[str, list[tuple[str, str]]]:
    """The embedded task: (docstring, package) pairs of `train`, `dev` and `test`, no two of them near-duplicates.

    Each label is capped at TASK_EXAMPLES. seed: the order within a split; which examples there are does not depend on it.
    """
    pools = {package: _by_split(package) for package in TASK_PACKAGES}
    seen = Duplicates(_SIMILAR)
    splits: dict[str, list[tuple[str, str]]] = {}
    for split, most in TASK_EXAMPLES.items():  # test first: what is like a test example is kept out of train
        taken: dict[str, list[tuple[str, str]]] = {package: [] for package in TASK_PACKAGES}
        for package in TASK_PACKAGES:
            for module, file in pools[package][split]:
                if len(taken[package]) >= most:
                    break
                texts = [entry.docstring for entry in read_module(package, module, file)]
                new = [(text, package) for text in texts if len(text) >= TASK_CHARACTERS and seen.first_seen(text)]
                taken[package] += new[: most - len(taken[package])]
        splits[split] = [example for row in zip_longest(*taken.values()) for example in row if example is not None]
        random.Random(seed).shuffle(splits[split])
    return {split: splits[split] for split in ("train", "dev", "test")}


def _by_split(package: str) -> dict[str, list[tuple[str, Path]]]:
    """The modules of each split in the order of their hash, so that those taken first are spread over the package."""
    found: dict[str, list[tuple[str, Path]]] = {split: [] for split in TASK_EXAMPLES}
    for module, file in sorted(modules(package), key=lambda item: (_hash(item[0]), item[0])):
        found[split_of(module)].append((module, file))
    return found


def _documented(node: ast.AST, package: str, module: str, outer: str, lines: list[str]) -> Iterator[Entry]:
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{outer}.{child.name}" if outer else child.name
            if docstring := ast.get_docstring(child):
                header = " ".join(line.strip() for line in lines[child.lineno - 1 : child.body[0].lineno - 1])
                yield Entry(package, module, name, header, docstring)
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, package, module, name, lines)


def _root(package: str) -> tuple[Path, bool]:
    """Folder of a package, and whether its own name begins its modules' names."""
    paths = sysconfig.get_paths()
    if package == "python":
        return Path(paths["stdlib"]), False
    places = [Path(paths[key]) / package for key in ("purelib", "platlib")]
    return next((place for place in places if place.is_dir()), places[0]), True


def _hash(module: str) -> int:
    return int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "big")
