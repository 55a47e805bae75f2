"""The verbs. Nothing heavy is imported until a verb runs: `trimline --help` answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

app = typer.Typer(
    name="trimline",
    help="From raw text to a pruned, evaluated language model: one recipe, one machine or a Slurm cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as pretrain.steps=200.")]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A user's mistake ends in its message and exit code 2, told once however many ranks meet it."""
    from pipeline.errors import UserError

    try:
        yield
    except UserError as error:
        from pipeline.launch.ranks import tell

        tell(f"\ntrimline: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        from pipeline.launch.ranks import STOPPED, tell

        tell("\ntrimline: stopped; run again to go on")
        sys.exit(STOPPED)


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    from pipeline import recipe

    return recipe.load(path, overrides or [])


@app.command()
def run(path: RecipeFile, overrides: Overrides = None) -> None:
    """Run every stage that is not up to date, here."""
    with _told():
        from pipeline import terminal, workflow

        recipe = _load(path, overrides)
        steps = workflow.resolve(recipe)
        terminal.opening(recipe, steps)
        for step in steps:
            terminal.stage(step)
            if step.artifact is None:
                _make(recipe, step.stage, path, overrides or [])
        terminal.closing(recipe, workflow.resolve(recipe))


def _make(recipe: Recipe, stage: str, path: Path, overrides: list[str]) -> None:
    """One stage: in this process where it is a rank or the only one, else by starting its ranks. Exits when it fails."""
    from pipeline import workflow
    from pipeline.launch import local, ranks

    here = ranks.Ranks.here()
    if here.by == "alone" and not local.in_process(recipe, stage):
        workflow.check(recipe, stage, getattr(recipe, stage).ranks)
        code = local.start(recipe, stage, path, overrides)
        if code:
            sys.exit(code)
        return
    ranks.end_with_starter()
    if stage not in local.TRAINING:
        ranks.stop_at_once()
    workflow.execute(recipe, stage, here)


def _stage_command(stage: str, does: str) -> None:
    def command(path: RecipeFile, overrides: Overrides = None) -> None:
        with _told():
            from pipeline import terminal, workflow

            recipe = _load(path, overrides)
            if stage not in recipe.stages:
                from pipeline.errors import UserError

                raise UserError(f"{path} has no section {stage!r}, so there is nothing to {stage}; it has {', '.join(recipe.stages)}")
            step = next(step for step in workflow.resolve(recipe) if step.stage == stage)
            if step.artifact is None:
                _make(recipe, stage, path, overrides or [])
            elif os.environ.get("RANK", "0") == "0":
                terminal.stage(step)

    app.command(name=stage, help=does)(command)


_stage_command("tokenize", "Documents -> tokenizer and token store.")
_stage_command("pack", "Token store -> plan of segments and groups.")
_stage_command("pretrain", "Plan -> pretrained model.")
_stage_command("index", "Causal model and documents -> datastore of keys and values.")
_stage_command("finetune", "Pretrained model -> model of a task.")
_stage_command("prune", "Model of a task -> smaller model of the task.")
_stage_command("evaluate", "Every model made -> report.")


@app.command()
def plan(path: RecipeFile, overrides: Overrides = None) -> None:
    """Say what `run` would do and why, without doing it."""
    with _told():
        from pipeline import terminal, workflow

        recipe = _load(path, overrides)
        terminal.plan(recipe, workflow.resolve(recipe))


@app.command()
def submit(
    path: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the jobs; submit and write nothing.")] = False,
) -> None:
    """Submit the stages that are not up to date as a chain of Slurm jobs."""
    with _told():
        from pipeline.launch import slurm

        slurm.submit(_load(path, overrides), dry_run=dry_run)


@app.command()
def status(path: RecipeFile, overrides: Overrides = None) -> None:
    """Show what each stage is doing: done, running, queued, stale."""
    with _told():
        from pipeline import terminal
        from pipeline.launch import slurm

        terminal.status(slurm.status(_load(path, overrides)))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="What pack made, a plan in it (train, valid), or a recipe.")],
    overrides: Overrides = None,
    groups: Annotated[int, typer.Option(help="Groups printed as text.", min=0)] = 3,
    sample: Annotated[int, typer.Option(help="Groups measured, at most.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Of the sample, and of the random plan it is compared with.", min=0)] = 1,
    store: Annotated[Path | None, typer.Option(metavar="DIR", help="Token store, where it is not beside the plan.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="Tokenizer, where it is not beside the plan.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a plan: how full its rows, how similar the segments of a group; and show some groups."""
    with _told():
        import json

        from pipeline import terminal
        from pipeline.packing import quality

        directory = path if path.is_dir() else _packed(path, overrides)
        plan, opened, loaded = quality.open_plan(directory, store, tokenizer)
        found = quality.measure(plan, opened, loaded, sample=sample, seed=seed, read=0 if as_json else groups)
        if as_json:
            print(json.dumps(found.figures(), indent=2))
        else:
            terminal.quality(found)


def _packed(path: Path, overrides: list[str] | None) -> Path:
    """What the pack stage of a recipe made."""
    from pipeline import workflow
    from pipeline.errors import UserError

    if not path.is_file():
        raise UserError(f"{path}: does not exist; give what pack made, such as runs/NAME/pack-1234abcd, or a recipe")
    step = next((step for step in workflow.resolve(_load(path, overrides)) if step.stage == "pack"), None)
    if step is None:
        raise UserError(f"{path} has no section 'pack', so there is no plan to inspect")
    if step.artifact is None:
        raise UserError(f"{path}: its plan is not made ({step.why}); run trimline pack first")
    return step.artifact.path


datastore = typer.Typer(help="Look at a datastore; add documents to it or withdraw them, without training.", no_args_is_help=True)
app.add_typer(datastore, name="datastore")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="What the index stage made, or the datastore in it.")]


@datastore.command()
def info(
    directory: Directory,
    find: Annotated[str, typer.Option(metavar="TEXT", help="List the documents that begin with words holding TEXT, or came from such a place.")] = "",
) -> None:
    """What a datastore holds, and which documents have a text."""
    with _told():
        from pipeline import terminal
        from pipeline.memory import description

        place = description.locate(directory)
        description.complete(place)
        about = description.read(place)
        description.check_sizes(place, about)
        terminal.datastore(place, about)
        if find:
            from pipeline.memory import documents

            terminal.documents(list(documents.search(place / documents.NAME, find)), f"with {find!r}")


@datastore.command()
def add(
    directory: Directory,
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files or globs of documents, as in a recipe's sources.")],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="The model that made the keys, where it is not where it was.")] = None,
    text: Annotated[str, typer.Option(metavar="COLUMN", help="Column that holds a document's text.")] = "text",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that lies in the model's directory.")] = False,
) -> None:
    """Index further documents; those that are there already are passed over."""
    with _told():
        from pipeline import terminal
        from pipeline.corpus.settings import Source
        from pipeline.memory import changes
        from pipeline.models.device import of_rank

        sources = [Source(path=path, text=text) for path in source]
        found = changes.add(directory, sources, model=model, trust_remote_code=trust_remote_code, device=of_rank(0))
        terminal.documents(found, "added")


@datastore.command()
def remove(
    directory: Directory,
    document: Annotated[list[int] | None, typer.Argument(metavar="[DOCUMENT]...", help="Numbers of documents, as info --find tells them.")] = None,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A file that holds the text of a document; may be given again.")] = None,
) -> None:
    """Withdraw documents: nothing of them can be retrieved afterwards, and their keys and values are overwritten."""
    with _told():
        from pipeline import terminal
        from pipeline.errors import UserError
        from pipeline.memory import changes

        if not document and not text:
            raise UserError("name a document by its number, or by --text FILE; trimline datastore info DIR --find TEXT tells the numbers")
        terminal.documents(changes.remove(directory, document or [], text or []), "withdrawn")


@app.command(name="generate")
def generate_text(
    path: Annotated[Path, typer.Argument(metavar="RECIPE|MODEL_DIR", help="A recipe whose model is made, or the directory of any causal model.")],
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="What the text begins with, of any length; - reads standard input.")] = "",
    memory: Annotated[str, typer.Option(help="What the model may look back at, such as local+long+external: see evaluate.memory.")] = "none",
    datastore: Annotated[Path | None, typer.Option(metavar="DIR", help="External memory, where it is not the recipe's own.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens read at a time; default: the recipe's, or all the model takes.", min=1)] = None,
    long_size: Annotated[int | None, typer.Option("--long", help="Entries of long memory; default: the recipe's.", min=1)] = None,
    tokens: Annotated[int, typer.Option(help="Tokens written at most.", min=1)] = 100,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token; nothing is drawn.")] = False,
    temperature: Annotated[float, typer.Option(help="Divides the log probabilities before a token is drawn.", min=0.01)] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many likeliest tokens.", min=1)] = None,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that have this probability together.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same text.", min=0)] = 1,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that lies in the model directory.")] = False,
) -> None:
    """Continue a text, with any of the memories."""
    with _told():
        from pipeline import generate
        from pipeline.memory.sampling import Sampling

        source = generate.find(path, overrides or [])
        source = source.with_options(datastore=datastore, window=window, long_size=long_size)
        text = sys.stdin.read() if prompt == "-" else prompt
        written, said = generate.text(
            source, text, memory, Sampling(greedy, temperature, top_k, top_p, seed), tokens=tokens, trust_remote_code=trust_remote_code
        )
        print(said, file=sys.stderr)
        for piece in written:
            print(piece, end="", flush=True)
        print()


@app.command()
def explain(key: Annotated[str, typer.Argument(help="A recipe key, such as pretrain.warmup_ratio; none: all sections.")] = "") -> None:
    """Explain a key of a recipe: meaning, unit, default, keys below it."""
    with _told():
        from pipeline import recipe

        print(recipe.explain(key))


def main() -> None:
    if "LOCAL_RANK" in os.environ:  # DeepSpeed's launcher tells each rank twice, unless it is told not to
        sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    from pipeline.launch.ranks import leaving

    with leaving():
        app()
