from __future__ import annotations

import pytest

from storage.digest import digest_files, digest_json, sha256_file


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest_json({"a": 1, "b": [1.5, None]}) == digest_json({"b": [1.5, None], "a": 1})
    assert digest_json([1, 2]) != digest_json([2, 1])
    assert digest_json("1") != digest_json(1)


def test_digests_stay_the_same_between_versions():
    assert digest_json({"name": "é", "spans": [[0, 1]], "ffn": 0.5}) == "f4788109f9ebd9b0"


def test_nan_has_no_digest():
    with pytest.raises(ValueError, match="JSON"):
        digest_json(float("nan"))


def test_files_count_by_name_and_content_but_not_by_folder(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"2")
    digest = digest_files([here / "a", here / "b"])
    assert digest == digest_files([there / "a", there / "b"])
    (there / "b").write_bytes(b"3")
    assert digest != digest_files([there / "a", there / "b"])
    (here / "b").rename(here / "c")
    assert digest != digest_files([here / "a", here / "c"])
    assert sha256_file(here / "a").startswith("6b86b273ff34fce1")
