from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from storage.errors import StoreError
from storage.store import StoreOptions, open_store
from tests.s3 import S3Server
from trainers.data.sources import DataConfig, DataError, list_units, read_unit


def png(value: int, size: tuple[int, int] = (20, 10)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def fill_folder(folder: Path, count: int = 5) -> DataConfig:
    for i in range(count):
        (folder / f"sub{i % 2}").mkdir(exist_ok=True)
        (folder / f"sub{i % 2}" / f"{i}.png").write_bytes(png(i))
        (folder / f"sub{i % 2}" / f"{i}.txt").write_text(f"grey {i}\n")
    return config(folder, "folder")


def fill_parquet(folder: Path, count: int = 5) -> DataConfig:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in range(2):
        rows = range(part, count, 2)
        table = pa.table(
            {
                "image": [{"bytes": png(i), "path": None} for i in rows],
                "caption": [f"grey {i}" for i in rows],
            }
        )
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=1)
    return config(folder, "parquet")


def fill_webdataset(folder: Path, count: int = 5) -> DataConfig:
    for part in range(2):
        with tarfile.open(folder / f"part-{part}.tar", "w") as tar:
            for i in range(part, count, 2):
                for name, content in ((f"{i}.png", png(i)), (f"{i}.txt", f"grey {i}".encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return config(folder, "webdataset")


def config(folder: Path, source: str) -> DataConfig:
    return DataConfig(
        source=source, path=str(folder), pictures=100, held_out=1, resolution=16, shard=2
    )


@pytest.mark.parametrize("fill", [fill_folder, fill_parquet, fill_webdataset])
def test_every_source_gives_its_pairs_whole_and_once(fill, tmp_path: Path):
    made = fill(tmp_path)
    units = list_units(made)
    assert [len(unit.items) for unit in units] == [2, 2, 1]
    assert units == list_units(made)
    found = []
    for unit in units:
        pictures, captions = read_unit(made, unit, seed=0)
        assert pictures.dtype == np.uint8
        assert pictures.shape == (len(captions), 16, 16, 3)
        for picture, caption in zip(pictures, captions, strict=True):
            assert caption == f"grey {picture[0, 0, 0]}"
        found += captions
    assert sorted(found) == [f"grey {i}" for i in range(5)]


def test_at_most_so_many_pictures_are_used(tmp_path: Path):
    made = fill_folder(tmp_path).model_copy(update={"pictures": 3})
    assert sum(len(unit.items) for unit in list_units(made)) == 3


def test_drawn_pictures_depend_on_seed_and_place_alone():
    shapes = DataConfig(pictures=6, held_out=1, shard=4)
    first, second = list_units(shapes)
    pictures, captions = read_unit(shapes, first, seed=1)
    again, captions_again = read_unit(shapes, first, seed=1)
    other, _ = read_unit(shapes, first, seed=2)
    assert captions == captions_again
    assert (pictures == again).all()
    assert (pictures != other).any()
    longer = list_units(DataConfig(pictures=10, held_out=1, shard=6))[0]
    assert (read_unit(shapes, longer, seed=1)[0][:4] == pictures).all()
    assert len(second.items) == 2


def test_two_pictures_with_one_caption_are_named(tmp_path: Path):
    made = fill_folder(tmp_path)
    (tmp_path / "sub0" / "2.jpg").write_bytes((tmp_path / "sub0" / "2.png").read_bytes())
    with pytest.raises(DataError, match=r"sub0/2\.\w+: shares its name.* with .*sub0/2\.\w+"):
        list_units(made)


def test_a_picture_without_a_caption_is_named(tmp_path: Path):
    made = fill_folder(tmp_path)
    (tmp_path / "sub0" / "2.txt").unlink()
    with pytest.raises(DataError, match=r"sub0/2\.png: a picture without a caption"):
        list_units(made)


def test_a_caption_without_a_picture_is_named(tmp_path: Path):
    made = fill_folder(tmp_path)
    (tmp_path / "sub1" / "1.png").unlink()
    with pytest.raises(DataError, match=r"sub1/1\.txt: a caption without a picture"):
        list_units(made)


def test_a_webdataset_sample_without_a_caption_is_named(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        entry = tarfile.TarInfo("7.png")
        entry.size = len(png(7))
        tar.addfile(entry, io.BytesIO(png(7)))
    with pytest.raises(DataError, match=r"x\.tar:7\.png: a picture without a caption"):
        list_units(config(tmp_path, "webdataset"))


@pytest.mark.parametrize(
    ("caption", "picture", "message"),
    [(None, png(1), "a picture but no caption"), ("grey", None, "a caption but no picture")],
)
def test_a_parquet_row_that_lacks_a_half_is_named(caption, picture, message, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [png(0), picture], "caption": ["grey", caption]})
    pq.write_table(table, tmp_path / "a.parquet")
    made = config(tmp_path, "parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: row 1: has {message}"):
        read_unit(made, list_units(made)[0], seed=0)


@pytest.mark.parametrize(
    ("picture", "caption", "message"),
    [
        ("https://x/1.png", "grey", "its picture is a str, not an encoded picture"),
        (png(0), 7, "its caption is a int, not a text"),
        (png(0), ["a", "b"], "its caption is a list, not a text"),
        (png(0), "  ", "has a picture but no caption"),
    ],
)
def test_a_parquet_column_of_something_else_is_named(picture, caption, message, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [picture] * 2, "caption": [caption] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    made = config(tmp_path, "parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: row 0: {message}"):
        read_unit(made, list_units(made)[0], seed=0)


def test_a_picture_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0))
        (tmp_path / f"{name}.txt").write_text("grey")
    made = config(tmp_path, "folder")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a picture \(Image size"):
        read_unit(made, list_units(made)[0], seed=0)


def test_a_parquet_file_without_the_column_says_which_it_has(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [png(0)], "text": ["grey"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'caption', only image, text"):
        list_units(config(tmp_path, "parquet"))


@pytest.mark.parametrize("source", ["folder", "parquet", "webdataset"])
def test_a_place_without_data_is_named(source: str, tmp_path: Path):
    with pytest.raises(DataError, match=str(tmp_path / "nothing")):
        list_units(config(tmp_path / "nothing", source))


@pytest.mark.parametrize(("source", "name"), [("parquet", "a.parquet"), ("webdataset", "a.tar")])
def test_a_cut_off_file_is_named(source: str, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"not what it says it is")
    with pytest.raises(DataError, match=name):
        list_units(config(tmp_path, source))


def test_a_damaged_picture_and_an_empty_caption_are_named(tmp_path: Path):
    made = fill_folder(tmp_path, 2)
    (tmp_path / "sub0" / "0.png").write_bytes(png(0)[:40])
    with pytest.raises(DataError, match=r"0\.png: cannot be read as a picture"):
        read_unit(made, list_units(made)[0], seed=0)
    (tmp_path / "sub0" / "0.png").write_bytes(png(0))
    (tmp_path / "sub0" / "0.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"0\.txt: its caption is empty"):
        read_unit(made, list_units(made)[0], seed=0)


@pytest.mark.parametrize("fill", [fill_folder, fill_parquet, fill_webdataset])
def test_pictures_in_s3_are_read_from_the_configured_server(
    fill, tmp_path: Path, s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
):
    local = fill(tmp_path)
    store = open_store(s3_url)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            store.write(str(file.relative_to(tmp_path)), file.read_bytes())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody listens
    options = StoreOptions(endpoint=s3_server.endpoint)
    made = local.model_copy(update={"path": s3_url})
    units = list_units(made, options)
    assert [len(unit.items) for unit in units] == [2, 2, 1]
    for unit, same in zip(units, list_units(local), strict=True):
        assert read_unit(made, unit, 0, options)[1] == read_unit(local, same, 0)[1]


def test_a_server_that_does_not_answer_is_one_sentence(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    made = config(Path("unused"), "folder").model_copy(update={"path": s3_url})
    with pytest.raises(StoreError, match=rf"data\.path: {s3_url}: the store does not answer"):
        list_units(made, StoreOptions(endpoint="http://127.0.0.1:9"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=rf"data\.path: {s3_url}: no AWS credentials"):
        list_units(made, StoreOptions())


def test_a_filesystem_that_is_not_there_is_one_sentence():
    made = config(Path("unused"), "folder").model_copy(update={"path": "gs://bucket/pictures"})
    with pytest.raises(DataError, match=r"data\.path: gs://bucket/pictures: .*gcsfs"):
        list_units(made)
    with pytest.raises(DataError, match=r"data\.path: nowhere://bucket: .*nowhere"):
        list_units(made.model_copy(update={"path": "nowhere://bucket"}))


def test_settings_that_leave_nothing_are_refused():
    with pytest.raises(ValidationError, match="needs one"):
        DataConfig(source="folder")
    with pytest.raises(ValidationError, match="none to train on"):
        DataConfig(pictures=4, held_out=4)


def test_a_resolution_that_cuts_a_token_is_refused():
    with pytest.raises(ValidationError, match=r"multiple of 16.*got 72; set 64 or 80"):
        DataConfig(resolution=72)
