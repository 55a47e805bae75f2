"""What a stage makes: a directory that is complete or absent, and knows what it was made of.

`runs/<name>/<stage>-<fingerprint8>/` appears by one rename, after its `manifest.json` was written last. While a stage works
the directory is called `<stage>-<fingerprint8>.partial`; what it holds is how unfinished work resumes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline import __version__
from pipeline.errors import UserError

FORMAT = 1
"""Raised when an artifact's contents change meaning: every fingerprint changes with it."""

MANIFEST = "manifest.json"
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy", "faiss-cpu")


class PlaceError(UserError):
    """A run directory that cannot be written: full, forbidden, or in the way."""


def results_only(settings: BaseModel) -> dict[str, Any]:
    """The fields that can change what a stage makes, as plain JSON values."""
    kept: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        if isinstance(field.json_schema_extra, dict) and not field.json_schema_extra.get("result", True):
            continue
        value = getattr(settings, name)
        kept[field.alias or name] = results_only(value) if isinstance(value, BaseModel) else _plain(value)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return results_only(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 (64 hexadecimal digits) of a stage's resolved settings, its inputs' fingerprints and the format version."""
    content = {"format": FORMAT, "settings": settings, "inputs": dict(sorted(inputs.items()))}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_identity(path: str | Path) -> str:
    """What a source file is, for a fingerprint: the sha256 of its bytes up to 64 MB, beyond that its size and time of change.

    A large file that is copied counts as changed; hashing it in full would make `trimline plan` read whole corpora.
    """
    stat = os.stat(path)
    if stat.st_size > 64 << 20:
        return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}"
    return sha256(path)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A published directory and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The headline figures of the stage."""
        return dict(self.manifest["metrics"])

    @classmethod
    def open(cls, path: Path, *, check_contents: bool = False) -> Artifact:
        """Raises UserError when the manifest is unreadable, or a file is missing, resized or (check_contents) altered."""
        manifest = _manifest(path)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        for name, (size, digest) in files.items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{file} {state}, the manifest says {size} bytes; remove {path} and run the stage again")
            if check_contents and sha256(file) != digest:
                raise UserError(f"{file} was altered since it was made; remove {path} and run the stage again")
        return cls(path, manifest)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        _ = [(entry["bytes"], entry["sha256"]) for entry in manifest["files"].values()]
        manifest["fingerprint"], manifest["metrics"], manifest["settings"], manifest["inputs"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: not a readable manifest ({error!r}); remove {path} and run the stage again") from None
    return manifest


def find(directory: Path, stage: str, digest: str) -> Artifact | None:
    """The published artifact of that stage and fingerprint, or None."""
    path = directory / f"{stage}-{digest[:8]}"
    if not path.is_dir():
        return None
    artifact = Artifact.open(path)
    if artifact.fingerprint != digest:
        raise UserError(f"{path / MANIFEST}: fingerprint {artifact.fingerprint[:16]}, expected {digest[:16]}; remove {path} and run the stage again")
    return artifact


def latest(directory: Path, stage: str) -> Artifact | None:
    """The artifact of a stage that was published last, whatever its settings; unreadable ones are passed over."""
    found = []
    for path in directory.glob(f"{stage}-????????"):
        with contextlib.suppress(UserError):
            found.append(Artifact.open(path))
    return max(found, key=lambda artifact: artifact.manifest["finished"], default=None)


@contextlib.contextmanager
def working(directory: Path, stage: str, digest: str) -> Iterator[Path]:
    """The `.partial` directory of a stage, locked against a second process while inside.

    An attempt that started it and ends in a user's mistake leaves nothing behind; any other end leaves what resumes.
    Raises UserError when another process works there, and PlaceError when the place cannot be written.
    """
    partial = directory / f"{stage}-{digest[:8]}.partial"
    resumed = partial.is_dir()
    make_directory(partial)
    with open(_lock(directory, stage, digest), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is making this; wait for it, or end it and run again") from None
        try:
            with disk_full_told():
                yield partial
        except PlaceError:
            raise
        except UserError:
            if not resumed:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def in_work(directory: Path, stage: str, digest: str) -> bool:
    """Whether a process on this machine is making that artifact now."""
    try:
        inode = os.stat(_lock(directory, stage, digest)).st_ino
        return any(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())
    except OSError:
        return False


def _lock(directory: Path, stage: str, digest: str) -> Path:
    return directory / f".{stage}-{digest[:8]}.lock"


@contextlib.contextmanager
def disk_full_told() -> Iterator[None]:
    """Turns 'no space left' into a message that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise PlaceError(f"{where}the disk is full; free some space and run again: finished stages are kept, this one resumes") from error


def make_directory(path: Path) -> None:
    """Raises PlaceError when the directory cannot be made or written."""
    try:
        with disk_full_told():
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"{path}: cannot be made ({error.strerror}); set runs_dir to a directory that can be written") from error
    if not os.access(path, os.W_OK):
        raise PlaceError(f"{path}: cannot be written (permission denied); give write permission, or set runs_dir elsewhere")


def publish(
    partial: Path, *, stage: str, digest: str, settings: Mapping[str, Any], inputs: Mapping[str, str], metrics: Mapping[str, Any], started: float
) -> Artifact:
    """Make a finished `.partial` directory an artifact: every file synced, the manifest last, then one rename.

    started: when the attempt that finished it began; the manifest's `seconds` do not count attempts that were cut off.
    """
    files = {}
    for file in sorted(path for path in partial.rglob("*") if path.is_file() and path.name != MANIFEST):
        sync(file)
        files[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    finished = time.time()
    manifest = {
        "stage": stage,
        "fingerprint": digest,
        "format": FORMAT,
        "settings": settings,
        "inputs": dict(inputs),
        "metrics": dict(metrics),
        "files": files,
        "started": started,
        "finished": finished,
        "seconds": round(finished - started, 3),
        "versions": _versions(),
        "git_commit": _git_commit(),
    }
    write_json(partial / MANIFEST, manifest)
    final = partial.with_name(partial.name.removesuffix(".partial"))
    os.rename(partial, final)
    sync(final.parent)
    return Artifact(final, manifest)


def revise(path: Path, below: str, files: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Bring the manifest of a published artifact up to date with a directory in it that was changed on purpose.

    files: everything in that directory, by its path there, with `bytes` and `sha256`; None: to be found out.
    """
    manifest = _manifest(path)
    kept = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{below}/")}
    for name, entry in files.items():
        file = path / below / name
        kept[f"{below}/{name}"] = dict(entry) if entry else {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(path / MANIFEST, {**manifest, "files": dict(sorted(kept.items()))})


def write_json(path: Path, content: Any) -> None:
    """Atomically: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    found = {"trimline": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _git_commit() -> str | None:
    """The commit of Trimline's own checkout, where it runs from one."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
