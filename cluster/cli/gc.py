"""`espalier gc`: what lies in a storage and nothing refers to."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.best import Storage
from cluster.cli.common import Json, endings, print_json

PANEL = "Look"


def register(app: typer.Typer) -> None:
    app.command("gc", rich_help_panel=PANEL)(gc)


def gc(
    storage: Storage = "runs",
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove what is listed; else nothing is changed.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(help="Hours; what was written since is never listed.", min=1.0),
    ] = 24.0,
    students: Annotated[
        bool,
        typer.Option(
            "--students",
            help="Also students that sweeps recovered and did not publish: another judge could "
            "choose among them.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List what was cut off or has been replaced, and nothing refers to.

    Encodings, analyses and the library stay: a later sweep may use them. So does what others keep
    in the storage, beside the folders that sweeps make.

    Examples:

      espalier gc --storage s3://bucket/espalier

      espalier gc --storage s3://bucket/espalier --older-than 48 --students --delete
    """
    with endings():
        from storage.garbage import discard, find_garbage
        from storage.store import open_store

        store = open_store(storage)
        found = find_garbage(store, older_than * 3600, students)
        for garbage in found if delete else ():
            discard(store, garbage)
        if as_json:
            listed = [garbage.model_dump(mode="json") for garbage in found]
            print_json({"storage": store.url, "deleted": delete, "garbage": listed})
            return
        for garbage in found:
            print(
                f"{garbage.kind:<22} {garbage.size:>16,} bytes  {garbage.seconds / 3600:8.1f} h  "
                f"{garbage.prefix}"
            )
        said = "removed" if delete else "to remove; --delete removes it"
        total = sum(garbage.size for garbage in found)
        print(f"{store.url}: {len(found)} found, {total:,} bytes {said}" if found else
              f"{store.url}: nothing to remove")  # fmt: skip
