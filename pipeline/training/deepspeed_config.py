"""A DeepSpeed JSON and a recipe -> the configuration DeepSpeed is given, strictly checked.

DeepSpeed 0.19 takes a misspelt key of the top level in silence and clips gradients at 1.0 where nothing is said; here neither
can happen. Imports neither torch nor deepspeed, so that a dry run can check the file.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.shipped import shipped
from pipeline.training.settings import TrainSettings

FROM_RECIPE = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "gradient_clipping",
}
"""What only the recipe says; in the file it is "auto" or left out."""

REFUSED = {
    "optimizer": "the recipe's lr, optimizer, betas, eps, momentum and weight_decay describe it",
    "scheduler": "the recipe's schedule, warmup_ratio, warmup_from and min_lr_ratio describe it",
    "activation_checkpointing": "the recipe's activation_checkpointing says it",
    "checkpoint": "Trimline writes and reads the checkpoints",
    "fp16": "fp16 needs loss scaling, which skips steps; use bf16 (a config whose name ends in -bf16)",
}
"""Keys DeepSpeed knows that would work against the training loop, and why."""

KNOWN = (
    *FROM_RECIPE,
    "aio", "bf16", "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_types", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown",
    "prescale_gradients", "steps_per_print", "tensorboard", "timers", "torch_autocast", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""Top-level keys that take effect under the training loop (read from DeepSpeed 0.19.8's runtime/config.py)."""


def render(name_or_path: str, settings: TrainSettings, *, rows: int, world: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    name_or_path: a file of ds_configs/ without its ending, or the path of a DeepSpeed JSON.
    rows: rows of one micro-batch on one rank (see `division`); world: ranks.
    Raises UserError naming file and line: no such file, not JSON, an unknown key, a value the recipe owns.
    """
    path, text = _find(name_or_path)
    config = _parse(path, text)
    for key, value in config.items():
        where = f"{path}:{_line(text, key)}"
        if key in REFUSED:
            raise UserError(f"{where}: {key} cannot be set here: {REFUSED[key]}; remove it")
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.6)
            raise UserError(f"{where}: unknown key {key!r}; " + (f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(KNOWN)}"))
        if key in FROM_RECIPE and value != "auto":
            raise UserError(
                f'{where}: {key} is {value!r} here, and {FROM_RECIPE[key]} of the recipe says it too; write "auto" here and the number in the recipe'
            )
    assert settings.batch_size % (rows * world) == 0, "rows come from division()"
    return config | {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": settings.batch_size // (rows * world),
        "gradient_clipping": settings.gradient_clipping,
        **({"zero_allow_untested_optimizer": True} if settings.optimizer != "adamw" else {}),  # DeepSpeed lists those it has tried
    }


def division(batch_size: int, unit: int, micro_batch_size: int, world: int) -> tuple[int, int]:
    """How a global batch is divided: rows of a micro-batch on each rank, and micro-batches a step.

    The fewest micro-batches of at most `micro_batch_size` rows that divide the batch exactly, in multiples of `unit` rows
    (rows that must stay together).  48 rows in units of 2, at most 8, on 2 ranks: 3 micro-batches of 8 rows a rank.
    Raises UserError, which says what batch sizes would do, where there is no such division.
    """
    if batch_size < world * unit:
        together = f" (rows stay together in units of {unit})" if unit > 1 else ""
        raise UserError(
            f"batch_size {batch_size} is too small for {world} ranks{together}: set batch_size to {world * unit} or more, "
            f"or use at most {max(1, batch_size // unit)} ranks"
        )
    if batch_size % (world * unit):
        below = batch_size // (world * unit) * world * unit
        each = f"ranks ({world})" if unit == 1 else f"ranks ({world}) times the rows that stay together ({unit})"
        raise UserError(f"batch_size {batch_size} is not a multiple of {each}: {below} or {below + world * unit} would do")
    if micro_batch_size < unit:
        raise UserError(f"micro_batch_size {micro_batch_size} cannot hold the {unit} rows that stay together; set it to {unit} or more")
    units = batch_size // (world * unit)
    accumulation = next(count for count in range(1, units + 1) if units % count == 0 and units // count * unit <= micro_batch_size)
    return units // accumulation * unit, accumulation


def _find(name_or_path: str) -> tuple[Path, str]:
    named = shipped("ds_configs", f"{name_or_path}.json")
    path = named if named.is_file() else Path(name_or_path)
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = sorted(file.stem for file in shipped("ds_configs").glob("*.json"))
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"deepspeed: {name_or_path}: {reason}; give the path of a DeepSpeed JSON, or one of {', '.join(names)}") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"{path}:{_line(text, twice)}: {twice} is given twice; keep one")
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object, found {type(config).__name__}")
    return config


def _line(text: str, key: str) -> int:
    found = re.search(rf'"{re.escape(key)}"\s*:', text)
    return text.count("\n", 0, found.start()) + 1 if found else 1
