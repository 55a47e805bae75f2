"""`trimline generate`: from a recipe, or the directory of any causal model, to text as it is written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts, recipe, workflow
from pipeline.errors import UserError
from pipeline.evaluation.settings import EvaluateSettings
from pipeline.memory.kinds import Memory
from pipeline.memory.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Source:
    """Where everything lies. window: block and context in tokens; None: as many as the model takes.
    evaluation: the report of the recipe's last evaluation, where there is one."""

    model: Path
    tokenizer: Path
    datastore: Path | None
    settings: EvaluateSettings
    window: tuple[int, int] | None = None
    memory_module: str | None = None
    evaluation: dict[str, Any] | None = None

    def with_options(self, datastore: Path | None, window: int | None, long_size: int | None) -> Source:
        """Those that are given in place of its own; half of a window is read again when it moves on."""
        long = self.settings.long if long_size is None else self.settings.long.model_copy(update={"size": long_size})
        return replace(
            self,
            datastore=datastore or self.datastore,
            window=self.window if window is None else (window - window // 2, window // 2),
            settings=self.settings.model_copy(update={"long": long}),
        )


def find(path: Path, overrides: Sequence[str]) -> Source:
    """A model directory, or what the stages of a recipe have made. Raises UserError when it is neither, or not made yet."""
    if path.is_dir():
        if overrides:
            raise UserError(f"{path} is a model directory, which has no settings to override ({overrides[0]}); give a recipe, or options")
        return Source(path, path, None, EvaluateSettings())
    chosen = recipe.load(path, tuple(overrides))
    made = {step.stage: step for step in workflow.resolve(chosen)}

    def output(stage: str) -> Path:
        step = made[stage]
        if step.artifact is None:
            raise UserError(f"{path}: {stage} is not made ({step.why}); run trimline {stage} first")
        return step.artifact.path

    if not chosen.pretrain and chosen.model.from_ is None:
        raise UserError(f"{path}: has no model that writes; add a pretrain section, or model.from: DIR")
    model = output("pretrain") / "model" if chosen.pretrain else Path(chosen.model.from_ or "")
    settings = chosen.evaluate or EvaluateSettings()
    store = Path(settings.datastore) if settings.datastore else output("index") / "datastore" if chosen.index and made["index"].artifact else None
    report = _last_report(chosen.directory, made["evaluate"].inputs.get("pretrain")) if "evaluate" in made else None
    tokenizer = output("tokenize") / "tokenizer" if chosen.tokenize else model
    return Source(model, tokenizer, store, settings, settings.window.resolved(chosen.row_length), chosen.model.memory_module, report)


def _last_report(directory: Path, pretrained: str | None) -> dict[str, Any] | None:
    """The report of the last evaluation, where it was of the model of that fingerprint."""
    last = artifacts.latest(directory, "evaluate")
    if last is None or last.manifest["inputs"].get("pretrain") != pretrained:
        return None
    return json.loads((last.path / "report.json").read_text())


def values(memory: Memory, source: Source) -> tuple[Memory, dict[str, float], str]:
    """The memory's values and where they are from: the last evaluation, which may also have its interpolated form; else their usual ones."""
    from pipeline.memory.mixtures import PARAMETERS, parameters

    rows = {row["memory"]: row["values"] for row in ((source.evaluation or {}).get("memories") or {"rows": []})["rows"]}
    if memory.rule == "joint" and "external" in memory and memory.interpolated().name in rows:
        memory = memory.interpolated()
    if memory.name in rows:
        return memory, rows[memory.name], "as the last evaluation tuned them"
    usual = {**{name: parameter.start for name, parameter in PARAMETERS.items()}, "neighbours": source.settings.external.k[-1]}
    return memory, {name: (usual | source.settings.fixed.given())[name] for name in parameters(memory)}, "not tuned for this model"


def text(source: Source, prompt: str, name: str, sampling: Sampling, *, tokens: int, trust_remote_code: bool = False) -> tuple[Iterator[str], str]:
    """The text that follows the prompt, in pieces as it is written, at most so many tokens; and a line that says with what.

    Raises UserError when the memory is unknown or lacks a datastore, or the model, the tokenizer and the datastore do not go together.
    """
    import torch

    from pipeline.corpus import tokenizer as tokenizers
    from pipeline.memory import generation
    from pipeline.memory.external import External
    from pipeline.models import build
    from pipeline.models.causal_reader import CausalReader
    from pipeline.packing.plan import tokenizer_identity

    try:
        memory, chosen, whence = values(Memory.of(name), source)
    except ValueError as error:
        raise UserError(f"--memory: {error}") from None
    if "external" in memory and source.datastore is None:
        raise UserError(f"--memory {name} looks up a datastore: give --datastore DIR, or a recipe whose index stage has run")
    tokenizer = tokenizers.load(source.tokenizer)
    model = build.load(source.model, head="causal", trust_remote_code=trust_remote_code)
    block, context = source.window or source.settings.window.resolved(getattr(model.config, "max_position_embeddings", None))
    build.check_fits(model, tokenizer, block + context)
    reader = CausalReader(model, source.memory_module)
    reader.check()
    external = None
    if "external" in memory and source.datastore is not None:
        external = External.open(source.datastore, source.model, tokenizer_identity(tokenizer), trust_remote_code=trust_remote_code)
        external.store.probe = source.settings.external.probe
        external.check_fits(tokenizer, block + context)
    setting = generation.Setting(
        memory, chosen, block, context, source.settings.long.size, external.store if external else None, external.encoder if external else None
    )
    beginning = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [_start(tokenizer, source.tokenizer)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    written = generation.write(reader, beginning, setting, sampling, end=tokenizer.eos_token_id, device=device)
    shown = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in chosen.items())
    said = f"memory {memory.name}{f' ({shown}; {whence})' if shown else ''}; window of {block + context} tokens"
    return _pieces(itertools.islice(written, tokens), tokenizer, beginning), said


def _start(tokenizer: PreTrainedTokenizerFast, place: Path) -> int:
    """What a text begins with that begins with nothing: documents stand behind one another's end."""
    found = next((token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None), None)
    if found is None:
        raise UserError(f"{place}: the tokenizer has no token that begins or ends a text; give a --prompt")
    return int(found)


def _pieces(written: Iterator[int], tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> Iterator[str]:
    """What each token adds to the text; a character that is not whole yet waits for the rest of it."""
    tokens = list(prompt)
    told = _decoded(tokenizer, tokens)
    for token in written:
        tokens.append(token)
        decoded = _decoded(tokenizer, tokens)
        if not decoded.endswith("\N{REPLACEMENT CHARACTER}"):
            yield decoded[len(told) :]
            told = decoded
    yield _decoded(tokenizer, tokens)[len(told) :]


def _decoded(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
