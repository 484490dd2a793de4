"""`espalier best`: the models that sweeps have published into a storage, best first."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.common import Json, endings, print_json, quieten_libraries
from storage.errors import EspalierError

if TYPE_CHECKING:
    from storage.registry import Entry
    from storage.store import Store

Storage = Annotated[
    str, typer.Option(help="Where sweeps keep everything: a folder or s3://bucket/prefix.")
]
Label = Annotated[
    str,
    typer.Argument(
        help="A budget's label, as in best/LABEL.", show_default=False, metavar="BUDGET"
    ),
]

best_app = typer.Typer(
    name="best",
    help="List, fetch, check or remove published models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class NothingPublishedError(EspalierError):
    """A budget that nothing was published for."""


def register(app: typer.Typer) -> None:
    app.add_typer(best_app, rich_help_panel="Use a model")


@best_app.command("ls")
def ls(storage: Storage = "runs", as_json: Json = False) -> None:
    """List every published model, the best of each budget first.

    Example: espalier best ls --storage s3://bucket/espalier
    """
    with endings():
        found = ranked(_open(storage))
        if as_json:
            print_json([entry.model_dump(mode="json") for entry in found])
            return
        if not found:
            print(f"{storage}: nothing is published there")
        for entry in found:
            print(_line(entry))


@best_app.command("get")
def get(
    budget: Label,
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    storage: Storage = "runs",
) -> None:
    """Fetch the best model of a budget, every file verified.

    Example: espalier best get 50pct --out half
    """
    with endings():
        from storage.manifest import fetch, published

        store = _open(storage)
        prefix = _best_model(store, budget)
        manifest = published(store, prefix)
        files = manifest.files if manifest else {}
        for file in sorted(out.rglob("[!.]*")):
            name = file.relative_to(out).as_posix()
            if file.is_file() and name not in files:
                # Shards of another model with their index would be loaded in place of this one.
                raise EspalierError(
                    f"--out {out}: holds {name}, which the best at {budget} does not have; give an "
                    "empty or a new folder"
                )
        fetch(store, prefix, out, manifest)
        print(f"{out}: the best at {budget}")


@best_app.command("verify")
def verify(budget: Label, storage: Storage = "runs") -> None:
    """Hold every file of the best model of a budget against its digest, then load it.

    Fails also when an entry of that budget is damaged, which may be a better model's.

    Example: espalier best verify 50pct
    """
    with endings():
        from storage.manifest import fetch
        from storage.registry import look

        store = _open(storage)
        prefix = _best_model(store, budget)
        quieten_libraries()
        from trainers.export import load_pipeline

        with tempfile.TemporaryDirectory(prefix="espalier-verify-") as scratch:
            manifest = fetch(store, prefix, Path(scratch))
            pipeline: Any = load_pipeline(Path(scratch))
            parameters = sum(p.numel() for p in pipeline.transformer.parameters())
        size = sum(entry.size for entry in manifest.files.values())
        print(
            f"{store.url}/{prefix}: {len(manifest.files)} files, {size:,} bytes, as published; "
            f"loads with {parameters:,} parameters"
        )
        for error in look(store, budget)[1].values():
            raise error


@best_app.command("rm")
def rm(
    budget: Label,
    plan: Annotated[
        str, typer.Option(help="The plan's digest, as `ls` shows it.", show_default=False)
    ],
    storage: Storage = "runs",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a model and its entry in the registry.

    What the sweep that made it keeps of it stays. Example: espalier best rm 50pct --plan 72269575
    """
    with endings():
        from storage.registry import show_best, withdraw_entry

        store = _open(storage)
        if not plan:
            raise EspalierError("--plan: is empty; give a digest, as `espalier best ls` does")
        chosen = [entry for entry in ranked(store, budget) if entry.plan_digest.startswith(plan)]
        if len(plans := {entry.plan_digest: None for entry in chosen}) > 1:
            raise EspalierError(
                f"--plan {plan}: {len(plans)} plans at {budget} begin so, {', '.join(plans)}; give "
                "more of one"
            )
        if not chosen:
            # A removal that was cut off may have left the copy of the best as it was.
            show_best(store, budget)
            raise NothingPublishedError(
                f"{store.url}: nothing published at {budget} has a plan {plan}; see `espalier best "
                "ls`"
            )
        for entry in chosen:
            print(_line(entry))
        if not yes:
            typer.confirm("Remove?", abort=True)
        for entry in chosen:
            withdraw_entry(store, entry)
        show_best(store, budget)


def ranked(store: Store, budget: str | None = None) -> list[Entry]:
    """Entries of one budget or of all; budgets in order, the best of each first."""
    from storage.registry import entries, rank

    return sorted(entries(store, budget), key=lambda entry: (entry.budget, *rank(entry)))


def _open(storage: str) -> Store:
    from storage.store import open_store

    return open_store(storage)


def _best_model(store: Store, budget: str) -> str:
    """The prefix of the best model of a budget."""
    from storage.registry import best

    entry = best(store, budget)
    if entry is None:
        there = sorted({entry.budget for entry in ranked(store)})
        known = f"there are {', '.join(there)}" if there else "nothing is published there yet"
        raise NothingPublishedError(f"{store.url}: no best model at {budget}; {known}")
    if entry.model is None:
        raise NothingPublishedError(
            f"{store.url}: the best at {budget}, plan {entry.plan_digest}, was published by an "
            f"earlier version; run the publish stage of sweep {entry.sweep} again"
        )
    return entry.model


def _line(entry: Entry) -> str:
    score = "" if entry.judge_score is None else f"  judge {entry.judge_score:.3f}"
    score += f" ({entry.judged} pictures)" if entry.judged else ""
    return (
        f"{entry.budget:<8} {entry.parameters:>14,} parameters  fidelity loss "
        f"{entry.fidelity_loss:.4g}{score}  plan {entry.plan_digest}  sweep {entry.sweep}  "
        f"{entry.created:%Y-%m-%d %H:%M}"
    )
