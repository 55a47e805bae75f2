"""Checkpoints of a training: complete or absent, verified when read, and read without executing anything they contain.

`step-00000100/` holds DeepSpeed's own shards (`deepspeed/`), `trainee.pt` (the side module, its optimiser, buffers) and
`state.json`: step, ranks, what must be the same on resume, the size and sha256 of every file. It appears by one rename after
all of that was synced. With another number of ranks the shards are first converted to DeepSpeed's universal layout.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from pipeline import __version__
from pipeline.artifacts import sha256, sync, write_json
from pipeline.errors import UserError
from pipeline.training.engine import persistent_buffers, quiet, zero_stage

FORMAT = 1
SHARDS = "deepspeed"
TRAINEE = "trainee.pt"
STATE = "state.json"

Result = TypeVar("Result")


@dataclass
class Checkpoints:
    """The checkpoints of one training, in `directory`, on a file system that all ranks share. Every rank calls every method.

    identity: what must be the same on resume (the batches' fingerprint, ZeRO stage, precision).
    keep: how many of the newest stay.
    """

    directory: Path
    engine: Any
    side: nn.Module | None
    side_optimizer: torch.optim.Optimizer | None
    identity: dict[str, Any]
    keep: int

    @property
    def _first(self) -> bool:
        return distributed.get_rank() == 0

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Writes the checkpoint of `step` finished steps. `progress`: plain JSON values that `restore` gives back.

        Raises OSError on every rank when any of them cannot write; what was there before stays.
        """
        from deepspeed.checkpoint.constants import (
            UNIVERSAL_CHECKPOINT_INFO,
            UNIVERSAL_CHECKPOINT_VERSION_KEY,
            UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        )

        final = self.directory / f"step-{step:08d}"
        unfinished = final.with_name(f"{final.name}.partial")
        _together(lambda: _fresh(unfinished) if self._first else None)
        shards = self.engine.checkpoint_engine = _recorder()
        universal = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
        with quiet():
            self.engine.save_checkpoint(str(unfinished), tag=SHARDS, client_state=universal, exclude_frozen_parameters=True)
        if self._first:
            shards.save(self._trainee_state(), str(unfinished / TRAINEE))
        written = _together(shards.result)
        files = {str(Path(name).relative_to(unfinished)): entry for found in _gather(written) for name, entry in found.items()}
        _together(lambda: self._publish(unfinished, final, step, progress, files) if self._first else None)

    def _trainee_state(self) -> dict[str, Any]:
        return {
            "side": self.side.state_dict() if self.side is not None else None,
            "side_optimizer": self.side_optimizer.state_dict() if self.side_optimizer is not None else None,
            "buffers": persistent_buffers(self.engine.module),
        }

    def _publish(self, unfinished: Path, final: Path, step: int, progress: dict[str, Any], files: dict[str, Any]) -> None:
        state = {
            "format": FORMAT,
            "step": step,
            "ranks": distributed.get_world_size(),
            "identity": self.identity,
            "progress": progress,
            "files": files,
            "versions": {"trimline": __version__, **{package: metadata.version(package) for package in ("torch", "deepspeed")}},
        }
        write_json(unfinished / STATE, state)
        for directory in (unfinished / SHARDS, unfinished):
            sync(directory)
        if final.exists():
            _remove(final)
        os.rename(unfinished, final)
        sync(final.parent)
        for old in self._complete()[self.keep :]:
            _remove(old)

    def _complete(self) -> list[Path]:
        """The complete checkpoints, newest first."""
        return sorted((path for path in self.directory.glob("step-????????") if path.is_dir()), reverse=True)

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """Loads the newest checkpoint that is whole into engine and side module: (finished steps, progress). None where there is none.

        A damaged one is named on stderr, put aside (`.damaged`), and the one before it tried. Raises UserError when all are
        damaged, when one was made with other data, ZeRO stage or precision, or holds pickled code.
        """
        candidates = [Path(name) for name in _from_first(lambda: [str(path) for path in self._complete()])]
        damaged: list[tuple[Path, str]] = []
        for path in candidates:
            problems = [problem for problem in _gather(_together(partial(self._damage, path))) if problem]
            if problems:
                damaged.append((path, problems[0]))
                continue
            if self._first:
                for bad, problem in damaged:
                    print(f"WARNING: checkpoint {bad} is damaged: {problem}; going back to {path.name}", file=sys.stderr, flush=True)
                    os.rename(bad, bad.with_name(f"{bad.name}.damaged"))
            state = json.loads((path / STATE).read_text())
            self._load(path, state["ranks"])
            return state["step"], state["progress"]
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged ({'; '.join(problem for _, problem in damaged)}); "
                f"restore one of them, or remove {self.directory} to train from the start"
            )
        return None

    def _damage(self, path: Path) -> str | None:
        """What is wrong with this rank's share of a checkpoint's files, or None. Raises UserError for one that must not be loaded."""
        try:
            state = json.loads((path / STATE).read_text())
            identity, step, files = state["identity"], state["step"], sorted(state["files"].items())
            expected = [(path / name, entry["bytes"], entry["sha256"]) for name, entry in files]
            state["ranks"], state["progress"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path / STATE} cannot be read ({error!r})"
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise UserError(
                    f"{path}: made with {key} {identity.get(key)!r}, this run has {value!r}; go on with what it was made with, "
                    f"or remove {self.directory} (step {step}) to train from the start"
                )
        for file, size, digest in expected[distributed.get_rank() :: distributed.get_world_size()]:
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != size:
                return f"{file} has {file.stat().st_size} bytes, expected {size}"
            if sha256(file) != digest:
                return f"{file} does not have the sha256 of {STATE}"
            with weights_only():
                torch.load(file, map_location="meta")  # reads the pickled structure, not the tensors
        return None

    def _load(self, path: Path, ranks: int) -> None:
        universal = ranks != distributed.get_world_size() and zero_stage(self.engine) > 0
        source = path.with_name(f"{path.name}.universal.partial") if universal else path
        if universal:
            _together(lambda: _convert(path, source, ranks) if self._first else None)
        hyperparameters = [{key: value for key, value in group.items() if key != "params"} for group in self.engine.basic_optimizer.param_groups]
        strict = all(parameter.requires_grad for parameter in self.engine.module.parameters())
        self.engine._config.load_universal_checkpoint = universal
        with quiet(), weights_only():
            loaded, _ = self.engine.load_checkpoint(str(source), tag=SHARDS, load_module_strict=strict)
            state = torch.load(path / TRAINEE, map_location="cpu")
        assert loaded is not None, f"DeepSpeed found nothing in {source}"
        self.engine._config.load_universal_checkpoint = False
        if universal:
            self._mend(hyperparameters)
        if self.side is not None:
            self.side.load_state_dict(state["side"])
        if self.side_optimizer is not None:
            self.side_optimizer.load_state_dict(state["side_optimizer"])
        with torch.no_grad():
            for name, buffer in persistent_buffers(self.engine.module).items():
                buffer.copy_(state["buffers"][name])
        distributed.barrier()
        if universal and self._first:
            shutil.rmtree(source)

    def _mend(self, hyperparameters: list[dict[str, Any]]) -> None:
        """DeepSpeed 0.19's universal ZeRO-3 loading gives every group the first one's settings, and all of them one step counter."""
        optimizer = self.engine.basic_optimizer
        for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
        for parameter, state in optimizer.state.items():
            state["step"] = torch.as_tensor(state["step"]).to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, every `torch.load` (DeepSpeed's own too, which would execute pickled code) builds only tensors, plain values and
    the few DeepSpeed classes of its optimiser state. Anything else raises UserError naming the file.
    """
    original = torch.load

    def load(file: Any, *args: Any, **options: Any) -> Any:
        try:
            with torch.serialization.safe_globals(_allowed_classes()):
                return original(file, *args, **(options | {"weights_only": True}))
        except pickle.UnpicklingError as error:
            found = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "not a tensor file")
            raise UserError(f"{file}: refused, it holds more than tensors ({found}); use a checkpoint that Trimline wrote") from None

    torch.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _allowed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address, (_member, "builtins.getattr")]


def _member(of: Any, name: str) -> Any:
    """What `getattr` may do here: name a member of an enumeration. That is how Python 3.11.0 to 3.11.3 pickle one."""
    if isinstance(of, enum.EnumMeta) and name in of.__members__:
        return of[name]
    raise pickle.UnpicklingError(f"Unsupported global: getattr of {name!r}")


def _convert(path: Path, universal: Path, ranks: int) -> None:
    """Rewrites a checkpoint's shards in DeepSpeed's universal layout, in this process, so that `weights_only` holds here too."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(path / SHARDS),
        output_folder=str(universal / SHARDS),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    _fresh(universal)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), weights_only():  # progress bars
            ds_to_universal.main(options)
    except (RuntimeError, AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be loaded by {distributed.get_world_size()} ranks ({error!r}); run with {ranks} ranks") from error


def _recorder() -> Any:
    """A DeepSpeed checkpoint engine that syncs and digests what this rank writes, and keeps a failure until all ranks can hear of it."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Recorder(TorchCheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.written: dict[str, dict[str, Any]] = {}
            self.failure: OSError | None = None

        def save(self, state_dict: Any, path: str) -> None:
            try:
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
                self.written[path] = {"bytes": os.path.getsize(path), "sha256": sha256(path)}
            except OSError as error:
                self.failure = OSError(error.errno, os.strerror(error.errno or 0), path)

        def result(self) -> dict[str, dict[str, Any]]:
            if self.failure is not None:
                raise self.failure
            return self.written

    return Recorder()


# -- files and ranks ---------------------------------------------------------------------------------------------------


def _fresh(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _remove(directory: Path) -> None:
    """So that a kill half-way leaves no half checkpoint under its own name."""
    gone = directory.with_name(f"{directory.name}.partial")
    os.rename(directory, gone)
    shutil.rmtree(gone)


def _gather(value: Result) -> list[Result]:
    """Every rank's value, on every rank."""
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def _from_first(compute: Callable[[], Result]) -> Result:
    """What the first rank computes, on every rank."""
    return _gather(compute() if distributed.get_rank() == 0 else None)[0]  # type: ignore[return-value]


def _together(action: Callable[[], Result]) -> Result:
    """This rank's result, once every rank has succeeded; where one failed, all raise what it raised."""
    result, failure = None, None
    try:
        result = action()
    except (OSError, UserError) as error:
        failure = error
    for found in _gather(failure):
        if found is not None:
            raise found
    return result  # type: ignore[return-value]
