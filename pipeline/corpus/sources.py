"""What a recipe's sources are: which files they name, and what makes them change. Quick: contents are hashed, never parsed."""

from __future__ import annotations

import glob
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline import artifacts
from pipeline.corpus.settings import Source, Specification, TokenizeSettings
from pipeline.errors import UserError
from pipeline.shipped import shipped

WIKITEXT = "wikitext"
BUILDERS = {".jsonl": "json", ".txt": "text", ".tokens": WIKITEXT, ".csv": "csv", ".parquet": "parquet"}
"""Extension of a corpus file -> the Hugging Face `datasets` builder that reads it; WikiText's we read ourselves. All but .parquet may be followed
by .gz."""

EMBEDDED_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "networkx": "networkx",
    "datasets": "datasets",
    "pydantic": "pydantic",
    "huggingface_hub": "huggingface_hub",
    "pyarrow": "pyarrow",
}
"""What the embedded corpus reads besides the standard library, where installed: import name -> distribution."""


def identity(settings: TokenizeSettings) -> list[Any]:
    """Everything outside the recipe that the tokenize stage depends on, as JSON values, for its fingerprint.

    Raises UserError for a source or tokenizer that is missing, empty or of an unknown kind.
    """
    sources = [source_identity(source) for source in (*settings.sources, *settings.validation_sources)]
    return [*sources, {"tokenizer": _tokenizer_identity(settings)}]


def directory_identity(directory: str | Path) -> dict[str, str]:
    """Every file below a directory, by its path in it. Raises UserError when there is none."""
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root}: {'is a file' if root.exists() else 'does not exist'}, expected a directory")
    found = {str(path.relative_to(root)): artifacts.file_identity(path) for path in sorted(root.rglob("*")) if path.is_file()}
    if not found:
        raise UserError(f"{root}: the directory is empty, expected files of a model or tokenizer")
    return found


def files(pattern: str) -> list[Path]:
    """The corpus files that a path or glob names, sorted. Raises UserError unless each is there, not empty and readable by a builder."""
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [Path(pattern)]
    if not paths:
        raise UserError(f"{pattern}: no file matches; correct the glob, or the directory it is relative to ({Path.cwd()})")
    for path in paths:
        builder(checked(path))
    return paths


def builder(path: Path) -> str:
    """What reads a corpus file, by its extension: see BUILDERS."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in BUILDERS or (kind == ".parquet" and path.suffix == ".gz"):
        known = ", ".join(BUILDERS)
        raise UserError(f"{path}: unknown kind of file {''.join(path.suffixes[-2:])!r}; known are {known}, and .gz after all but .parquet")
    return BUILDERS[kind]


def embedded_versions() -> dict[str, str]:
    """Python and every package the embedded corpus reads here, with versions: the same versions give the same corpus."""
    found = {"python": platform.python_version()}
    for package, distribution in EMBEDDED_PACKAGES.items():
        try:
            found[package] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def tokenizer_path(name: str) -> Path:
    """Where the recipe's `tokenizer` is: a shipped specification by its name, else a path.

    Raises UserError, listing the shipped ones, when there is nothing there.
    """
    named = shipped("tokenizers", f"{name}.yaml")
    path = named if "/" not in name and named.is_file() else Path(name)
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in named.parent.glob("*.yaml")))
        raise UserError(
            f"tokenize.tokenizer {name!r}: no such tokenizer; give one of {known}, a .yaml specification, a SentencePiece .model"
            " or a Hugging Face tokenizer directory"
        )
    if path.is_file() and path.suffix not in (".yaml", ".yml", ".model"):
        raise UserError(f"{path}: expected a .yaml specification, a SentencePiece .model or a Hugging Face tokenizer directory")
    return path


def specification(path: Path, vocab_size: int | None = None) -> Specification:
    """A tokenizer specification, its `vocab_size` overridden by the recipe's. Raises UserError naming the file and key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML specification: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys of a tokenizer specification ({', '.join(Specification.model_fields)}), found {content!r}")
    if vocab_size is not None:
        content["vocab_size"] = vocab_size
    try:
        return Specification.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        where = "tokenize.vocab_size" if key == "vocab_size" and vocab_size is not None else f"{path}: {key}"
        found = f", found {problem['input']!r}" if problem["type"] != "missing" else ""
        raise UserError(f"{where}: {problem['msg']}{found}; known keys are {', '.join(Specification.model_fields)}") from None


def source_identity(source: Source) -> dict[str, Any]:
    """What one source is: versions of packages, the name of a dataset, or files by their contents. Raises UserError for a missing file."""
    if source.embedded:
        return {"embedded": embedded_versions()}
    if source.hub is not None:
        return {"hub": source.hub, "subset": source.subset, "split": source.split}
    assert source.path is not None
    return {"files": {str(path): artifacts.file_identity(path) for path in files(source.path)}}


def _tokenizer_identity(settings: TokenizeSettings) -> Any:
    path = tokenizer_path(settings.tokenizer)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return artifacts.results_only(specification(path, settings.vocab_size))
    if settings.vocab_size is not None:
        raise UserError(f"tokenize.vocab_size is for tokenizers that are trained; {path} comes with its vocabulary: leave vocab_size out")
    return directory_identity(path) if path.is_dir() else artifacts.file_identity(checked(path))


def checked(path: Path) -> Path:
    """The path of a file that is there and not empty; else raises UserError."""
    if not path.is_file():
        found = "is a directory, expected a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found}; correct the path (relative to {Path.cwd()})")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; give a file with content, or take it out of the recipe")
    return path
