from __future__ import annotations

import re

import pytest

from storage import layout
from storage.errors import StoreError


def test_every_prefix_is_where_the_readme_says():
    assert layout.encoded("d") == "encoded/d"
    assert layout.analysis("d") == "analysis/d"
    assert layout.replacement("t", "d") == "library/t/d"
    assert layout.stage("s", "encode") == "sweeps/s/stages/encode"
    assert layout.search("s") == "sweeps/s/search"
    assert layout.checkpoint("s", "10B", "x") == "sweeps/s/recovery/10B/x/checkpoints"
    assert layout.finalist("s", "10B", "x") == "sweeps/s/recovery/10B/x/student"
    assert layout.report("s") == "sweeps/s/report"
    assert layout.best("50pct") == "best/50pct"
    assert layout.model("50pct", "m") == "models/50pct/m"
    assert layout.registered("50pct") == "registry/50pct"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "../x", ".hidden", "é", "a" * 101])
def test_names_that_could_reach_another_prefix_are_refused(name):
    with pytest.raises(StoreError, match="not a name for storage"):
        layout.sweep(name)


def test_every_prefix_lies_under_a_root_that_the_table_above_names():
    made = [
        layout.encoded("d"), layout.costs("d"), layout.analysis("d"), layout.probe("d"),
        layout.replacement("t", "d"), layout.sweep("s"), layout.best("10B"),
        layout.model("10B", "m"), layout.registry(), layout.registered("10B"),
    ]  # fmt: skip
    assert {prefix.split("/")[0] for prefix in made} | {"studies"} == set(layout.ROOTS)
    assert set(re.findall(r"^    (\w+)/", layout.__doc__, re.MULTILINE)) == set(layout.ROOTS)
