"""Where pictures and captions come from, cut into units of a shard each.

A unit names its pictures exactly (files, row ranges, byte ranges, seeds), so that it gives the same
shard wherever and whenever it is read; that is what lets an encoding resume shard by shard. Listing
happens once, on the driver; reading happens in Ray Data's tasks, and needs neither torch nor Ray.
Paths may be anything fsspec opens: a folder, s3://bucket/prefix and so on.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, NonNegativeInt, PositiveInt, model_validator

from storage.errors import EspalierError
from storage.section import Section
from storage.urls import address

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.store import StoreOptions

TOKEN = 16
"""Pixels a side of an image token: the eight of the families' autoencoders, two by two."""
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class DataError(EspalierError):
    """Pictures and captions that cannot be used as they are."""


def of_whole_tokens(resolution: int) -> int:
    """The pixels a side themselves; ValueError when they are no whole tokens."""
    if resolution % TOKEN:
        below = resolution - resolution % TOKEN
        raise ValueError(
            f"must be a multiple of {TOKEN}, the pixels of a token, got {resolution}; set "
            f"{below or TOKEN} or {below + TOKEN}"
        )
    return resolution


class DataConfig(Section):
    """The pictures and captions that students learn from."""

    source: Literal["shapes", "folder", "parquet", "webdataset"] = "shapes"
    """`shapes` draws its own; `folder` holds pictures with a caption file beside each; `parquet`
    files have a picture and a caption column; `webdataset` is tar files of such pairs."""

    path: Annotated[str, AfterValidator(address)] | None = None
    """Folder of the source, local or a URL that fsspec opens; not used by `shapes`. In S3 it is
    reached as `store` says. An encoding is named by this configuration: give changed content
    another path."""

    caption_extension: str = "txt"
    """Extension of caption files in a folder or webdataset."""

    picture_column: str = "image"
    """Column of a parquet source that holds encoded pictures: bytes, or a struct with `bytes`."""

    caption_column: str = "caption"
    """Column of a parquet source that holds captions."""

    pictures: PositiveInt = 1500
    """At most so many pictures are used, in the source's order; the held-out ones included."""

    held_out: NonNegativeInt = 48
    """Pictures that no training sees: fidelity is measured on them."""

    resolution: Annotated[PositiveInt, AfterValidator(of_whole_tokens)] = 64
    """Pixels a side, a multiple of 16; pictures are cropped to a square around their middle and
    resized."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """In which the encoders run, and in which latents and embeddings are stored."""

    shard: PositiveInt = 128
    """Pictures in a shard: in memory at once, and what a worker that is cut off has to repeat."""

    batch_size: PositiveInt = 64
    """Pictures that an encoder takes at once."""

    @model_validator(mode="after")
    def _a_source_has_a_path(self) -> Self:
        if self.source != "shapes" and self.path is None:
            raise ValueError(f"path: the source {self.source!r} needs one")
        if self.held_out >= self.pictures:
            raise ValueError(
                f"held_out: {self.held_out} of {self.pictures} pictures leave none to train on"
            )
        return self


@dataclass(frozen=True)
class Unit:
    """What one shard is made from."""

    number: int
    items: tuple[Any, ...]
    """Plain values whose meaning is the source's own."""


def list_units(config: DataConfig, options: StoreOptions | None = None) -> list[Unit]:
    """The source cut into units, the same at every call; `options` say how S3 is reached.

    Raises DataError when nothing is there, or naming the first picture without a caption or
    caption without a picture, and StoreError when S3 does not answer.
    """
    with _translated(config):
        items = _LISTERS[config.source](config, options)[: config.pictures]
    if len(items) <= config.held_out:
        raise DataError(
            f"{config.path}: {len(items)} pictures with captions are there and data.held_out keeps "
            f"{config.held_out} of them; at least one must be left to train on"
        )
    starts = range(0, len(items), config.shard)
    return [Unit(n, tuple(items[at : at + config.shard])) for n, at in enumerate(starts)]


def read_unit(
    config: DataConfig, unit: Unit, seed: int, options: StoreOptions | None = None
) -> tuple[NDArray[np.uint8], list[str]]:
    """The unit's pictures [n, resolution, resolution, 3] and captions.

    `seed` decides what the shapes source draws, `options` say how S3 is reached. Raises DataError
    naming a picture or caption that cannot be read, and StoreError when S3 does not answer.
    """
    import numpy as np

    pictures, captions = [], []
    with _translated(config):
        for picture, caption in _READERS[config.source](config, unit.items, seed, options):
            pictures.append(picture)
            captions.append(caption)
    return np.stack(pictures), captions


def _list_shapes(config: DataConfig, options: StoreOptions | None) -> list[Any]:
    return list(range(config.pictures))


def _read_shapes(
    config: DataConfig, items: Sequence[Any], seed: int, options: StoreOptions | None
) -> Iterator[Any]:
    from trainers.tasks.shapes.draw import draw
    from trainers.tasks.shapes.grammar import compose, sample_training_request

    for index in items:
        rng = random.Random(f"{seed}/{index}")
        request = sample_training_request(rng)
        yield draw(compose(request, rng), rng, config.resolution), request.caption


def _list_folder(config: DataConfig, options: StoreOptions | None) -> list[Any]:
    _, files = _files(config, options)
    return _pairs(config, [(file, file) for file in files])


def _read_folder(
    config: DataConfig, items: Sequence[Any], seed: int, options: StoreOptions | None
) -> Iterator[Any]:
    filesystem = _filesystem(config, options)[0]
    for picture, caption in items:
        yield (
            _decode(filesystem.cat_file(picture), picture, config.resolution),
            _text(filesystem.cat_file(caption), caption),
        )


def _list_webdataset(config: DataConfig, options: StoreOptions | None) -> list[Any]:
    """(tar, picture's offset and size, caption's offset and size, picture's name) a sample."""
    import tarfile

    filesystem, files = _files(config, options, ".tar")
    items: list[Any] = []
    for file in files:
        try:
            with filesystem.open(file, "rb") as stream, tarfile.open(fileobj=stream) as tar:
                members = {member.name: member for member in tar if member.isfile()}
        except tarfile.TarError as error:
            raise DataError(f"{file}: not a whole tar file ({error}); replace it") from error
        named = [(f"{file}:{name}", name) for name in sorted(members)]
        for picture, caption in _pairs(config, named):
            p, c = members[picture], members[caption]
            items.append((file, p.offset_data, p.size, c.offset_data, c.size, p.name))
        if len(items) >= config.pictures:
            break
    return items


def _read_webdataset(
    config: DataConfig, items: Sequence[Any], seed: int, options: StoreOptions | None
) -> Iterator[Any]:
    filesystem = _filesystem(config, options)[0]
    for file, picture_at, picture_size, caption_at, caption_size, name in items:
        # By name: s3fs has another argument in the second place.
        picture = filesystem.cat_file(file, start=picture_at, end=picture_at + picture_size)
        caption = filesystem.cat_file(file, start=caption_at, end=caption_at + caption_size)
        where = f"{file}:{name}"
        yield _decode(picture, where, config.resolution), _text(caption, where)


def _list_parquet(config: DataConfig, options: StoreOptions | None) -> list[Any]:
    """(file, row) a picture."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    filesystem, files = _files(config, options, ".parquet")
    items: list[Any] = []
    for file in files:
        try:
            with filesystem.open(file, "rb") as stream:
                table = parquet.ParquetFile(stream)
                columns, rows = table.schema_arrow.names, table.metadata.num_rows
        except arrow.ArrowInvalid as error:
            raise DataError(f"{file}: not a whole parquet file ({error}); replace it") from error
        for column in (config.picture_column, config.caption_column):
            if column not in columns:
                raise DataError(
                    f"{file}: has no column {column!r}, only {', '.join(columns)}; set "
                    "data.picture_column and data.caption_column"
                )
        items += [(file, row) for row in range(rows)]
        if len(items) >= config.pictures:
            break
    return items


def _read_parquet(
    config: DataConfig, items: Sequence[Any], seed: int, options: StoreOptions | None
) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    filesystem = _filesystem(config, options)[0]
    columns = [config.picture_column, config.caption_column]
    for file in dict.fromkeys(file for file, _ in items):
        wanted = {row for name, row in items if name == file}
        with filesystem.open(file, "rb") as stream:
            table, start = parquet.ParquetFile(stream), 0
            for group in range(table.num_row_groups):
                stop = start + table.metadata.row_group(group).num_rows
                here = sorted(wanted.intersection(range(start, stop)))
                if here:
                    taken = table.read_row_group(group, columns)
                    for row, values in zip(
                        here, taken.take([r - start for r in here]).to_pylist(), strict=True
                    ):
                        yield _parquet_row(config, f"{file}: row {row}", values)
                start = stop


def _parquet_row(config: DataConfig, where: str, values: dict[str, Any]) -> Any:
    picture, caption = values[config.picture_column], values[config.caption_column]
    if isinstance(picture, dict):
        picture = picture.get("bytes")
    if not picture:
        raise DataError(f"{where}: has a caption but no picture; remove the row")
    if not isinstance(picture, bytes):
        raise DataError(
            f"{where}: its picture is a {type(picture).__name__}, not an encoded picture; set "
            "data.picture_column to a column that holds the files' content"
        )
    if not isinstance(caption, str | None):
        raise DataError(
            f"{where}: its caption is a {type(caption).__name__}, not a text; set "
            "data.caption_column to a column of texts"
        )
    if not caption or not caption.strip():
        raise DataError(f"{where}: has a picture but no caption; remove the row")
    return _decode(picture, where, config.resolution), caption.strip()


@contextmanager
def _translated(config: DataConfig) -> Iterator[None]:
    """Turns what a filesystem raises into one sentence, where it enters."""
    if config.path is None:
        yield
        return
    where = f"data.path: {config.path}"
    s3: AbstractContextManager[None] = nullcontext()
    if _in_s3(config.path):
        from storage.s3 import translated

        s3 = translated(where)
    try:
        with s3:
            yield
    except ImportError as error:
        raise DataError(f"{where}: cannot be opened ({error}); install that package") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read ({error}); check the path") from error


def _in_s3(path: str) -> bool:
    return path.startswith(("s3://", "s3a://"))


def _filesystem(config: DataConfig, options: StoreOptions | None) -> tuple[Any, str]:
    """Where the source lies, and its path there."""
    import fsspec

    assert config.path is not None
    arguments: dict[str, Any] = {}
    if _in_s3(config.path) and options is not None:
        from storage.s3 import s3_arguments

        arguments = s3_arguments(options)
    found: tuple[Any, str] = fsspec.core.url_to_fs(config.path, **arguments)
    return found


def _files(
    config: DataConfig, options: StoreOptions | None, extension: str | None = None
) -> tuple[Any, list[str]]:
    filesystem, root = _filesystem(config, options)
    files = sorted(filesystem.find(root))
    found = [file for file in files if extension is None or file.endswith(extension)]
    if not found:
        raise DataError(f"data.path: {config.path}: no {extension or 'file'} is there")
    return filesystem, found


def _pairs(config: DataConfig, named: Sequence[tuple[str, str]]) -> list[Any]:
    """(picture, caption) by equal names but for the extension; each entry is (shown, name)."""
    caption_extension = "." + config.caption_extension.lstrip(".")
    pictures: dict[str, tuple[str, str]] = {}
    captions: dict[str, tuple[str, str]] = {}
    for shown, name in named:
        path = PurePosixPath(name)
        stem = str(path.with_suffix(""))
        if path.suffix.lower() in PICTURES:
            if stem in pictures:
                raise DataError(
                    f"{shown}: shares its name, and so its caption, with {pictures[stem][0]}; "
                    "rename one of them, with a caption of its own, or remove it"
                )
            pictures[stem] = (shown, name)
        elif path.suffix == caption_extension:
            captions[stem] = (shown, name)
    for stem, (shown, _) in pictures.items():
        if stem not in captions:
            raise DataError(
                f"{shown}: a picture without a caption; put one beside it in a "
                f"{caption_extension} file of the same name"
            )
    for stem, (shown, _) in captions.items():
        if stem not in pictures:
            raise DataError(f"{shown}: a caption without a picture; add the picture or remove it")
    return [(pictures[stem][1], captions[stem][1]) for stem in sorted(pictures)]


def _decode(content: bytes, where: str, resolution: int) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(
            f"{where}: cannot be read as a picture (of no known format); remove it"
        ) from error
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot be read as a picture ({error}); remove it") from error
    return np.asarray(ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS))


def _text(content: bytes, where: str) -> str:
    try:
        caption = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its caption is not UTF-8 text ({error})") from error
    if not caption:
        raise DataError(f"{where}: its caption is empty; write one or remove the pair")
    return caption


_LISTERS: dict[str, Callable[[DataConfig, StoreOptions | None], list[Any]]] = {
    "shapes": _list_shapes,
    "folder": _list_folder,
    "parquet": _list_parquet,
    "webdataset": _list_webdataset,
}
_READERS: dict[
    str, Callable[[DataConfig, Sequence[Any], int, StoreOptions | None], Iterator[Any]]
] = {
    "shapes": _read_shapes,
    "folder": _read_folder,
    "parquet": _read_parquet,
    "webdataset": _read_webdataset,
}
