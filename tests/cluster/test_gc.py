from __future__ import annotations

import json
import os
import time
from pathlib import Path

from typer.testing import CliRunner, Result

from cluster.cli.main import app
from storage.manifest import publish
from storage.store import open_store


def espalier(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["gc", *(str(argument) for argument in arguments)])


def test_lists_and_removes_only_when_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    publish(store, "library/t/whole", {"a": b"1"})
    store.write("library/t/cut/a", b"123")
    assert "nothing to remove" in espalier("--storage", tmp_path).stdout  # it is young
    yesterday = time.time() - 30 * 3600
    for name in ("whole/a", "whole/manifest.json", "cut/a"):
        os.utime(tmp_path / "library" / "t" / name, (yesterday, yesterday))
    shown = espalier("--storage", tmp_path)
    assert "unfinished publication" in shown.stdout
    assert "1 found, 3 bytes to remove; --delete" in shown.stdout
    told = json.loads(espalier("--storage", tmp_path, "--json").stdout)
    assert told["deleted"] is False
    assert told["garbage"][0]["keys"] == ["library/t/cut/a"]
    assert len(list(store.keys(""))) == 3
    assert "removed" in espalier("--storage", tmp_path, "--delete").stdout
    assert list(store.keys("")) == ["library/t/whole/a", "library/t/whole/manifest.json"]


def test_less_than_an_hour_is_refused(tmp_path: Path) -> None:
    assert espalier("--storage", tmp_path, "--older-than", "0").exit_code == 2
