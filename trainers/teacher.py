"""The teacher: a diffusers pipeline folder, proven whole before anything of it is loaded."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from storage.digest import digest_json, sha256_file
from storage.errors import DamagedError, EspalierError, MissingKey
from storage.manifest import MANIFEST, Manifest, published, seal
from storage.pieces import PiecedFile
from storage.store import Store, StoreOptions, open_store
from storage.tensors import check_safetensors, load_tensors
from trainers.cache import CacheError, local_copy
from trainers.students.families import family_of
from trainers.students.families.base import Config, Family
from trainers.students.plan import Plan, identity_plan

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from trainers.weights import Weights

_log = logging.getLogger(__name__)

_NEEDED = ("vae", "text_encoder", "tokenizer", "transformer")
# A family may have a second text encoder and tokenizer, whose names go on with a number.
_WEIGHTED = ("transformer", "vae", "text_encoder")
_ENCODERS = ("vae", "text_encoder", "tokenizer")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""Owner and model, and after an @ a branch, tag or commit."""
_CONFIG = "transformer/config.json"
_HUB_FILES = ["*.json", "*.txt", "*.jinja", "*/*.safetensors", "README.md"]
"""Weights in folders only: FLUX.1-dev has the same ones again, in one file, beside them. README.md
is the card, whose licence a student's card repeats."""
_REMEMBERED_SIZE = 64 * 2**20
"""Bytes from which a file's digest is kept in the user's cache: hashing 40 GB takes a minute."""


_whole_here: dict[tuple[str, str], Path] = {}
"""By address and digest, the folders that this process has fetched, or proven to be whole."""


class TeacherError(EspalierError):
    """A pipeline folder that is missing something or damaged."""


@dataclass(frozen=True)
class HubModel:
    """A model of the Hugging Face hub at one commit, the same whenever and wherever it is asked
    for."""

    name: str
    """Owner and model."""
    commit: str

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"

    def fetched(self) -> Path:
        """Its folder in this machine's cache of the hub."""
        return _fetched(self.name, self.commit)


@dataclass(frozen=True)
class Teacher:
    """A pipeline folder that has been checked. Cheap to send to another process.

    A `dtype` of None keeps what the files hold. All that is loaded is frozen and in eval mode.
    """

    name: str
    """As the user gave it."""
    found: Path
    """Where it lies on the machine that opened it; see `folder`."""
    digest: str
    """16 hex digits over the transformer's config and weights."""
    encoder_digest: str
    """The same over VAE, text encoders and tokenizers: what encoded data depends on."""
    family: Family = field(compare=False)
    config: Config = field(compare=False)
    """transformer/config.json."""
    url: str | None = None
    """Of one in a store: where its transformer's weights are read by range, each piece verified.
    One published before files had digests of their pieces is read as it comes: only a file that
    ends too early is noticed."""
    options: StoreOptions | None = field(default=None, compare=False)
    """How that store is reached."""
    hub: HubModel | None = None
    """Which model of the Hugging Face hub it is, if it is one."""

    @property
    def address(self) -> str:
        """What this very teacher is opened by, of the hub or a store on any machine."""
        return self.url or (str(self.hub) if self.hub else str(self.found))

    @property
    def folder(self) -> Path:
        """The pipeline on this machine, fetched when it is not here yet; of one in a store, a copy
        without the transformer's weights."""
        if self.url is None and self.hub is None:
            if self.found.is_dir():
                return self.found
            raise TeacherError(
                f"teacher {self.found}: no such folder on {socket.gethostname()}; put it where "
                "every machine finds it under this path, or give a name on the Hugging Face hub or "
                "the URL of a published one"
            )
        # A folder that is there may be one that another process is still filling.
        known = _whole_here.get((self.address, self.digest))
        if known is None or not known.is_dir():
            known = (
                self.hub.fetched()
                if self.hub is not None
                else _brought(self.address, self.options, patient=True)[0]
            )
            _whole_here[self.address, self.digest] = known
        return known

    def weights(self) -> Weights:
        """The transformer's, of which nothing but names is read before it is asked for."""
        from trainers.weights import Weights

        if self.url is None:
            files = map(str, _weights(self.folder / "transformer"))
            return Weights({file: partial(FileIO, file) for file in files})
        store, prefix, manifest = _published(self.url, self.options, patient=True)
        return Weights(
            {
                name: PiecedFile(store, prefix, name, entry).open
                if entry.xxh3
                else partial(store.read, entry.key(prefix, name))
                for name, entry in sorted(manifest.files.items())
                if _is_remote(name)
            }
        )

    def transformer(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> nn.Module:
        """The whole model: on CPUs mapped from its files, otherwise read tensor by tensor to where
        it shall be. The weights of one in a store are first copied to this machine, once for all
        its processes; without room for them each reads the store itself."""
        import torch

        from trainers.weights import fill

        near = self._near()
        weights, plan = near.weights(), self.identity
        wanted = dtype or weights.dtype
        model = self.family.build(self.config, plan, "meta", wanted)
        mapped = near._mapped() if near.url is None and torch.device(device).type == "cpu" else {}
        if mapped.keys() == model.state_dict().keys():
            floats = {k: t.to(wanted) if t.is_floating_point() else t for k, t in mapped.items()}
            model.load_state_dict(floats, assign=True)
        else:
            model = self.family.build(self.config, plan, device, wanted)
            fill(model, weights)
        return model.requires_grad_(False).eval()

    def _near(self) -> Teacher:
        """The same with its weights on this machine, if they have room."""
        if self.url is None:
            return self
        try:
            whole = local_copy(*_published(self.url, self.options, patient=True))
        except CacheError as error:
            _log.warning("%s; until then every process reads %s", error, self.url)
            return self
        return replace(self, found=whole, url=None)

    def _mapped(self) -> dict[str, Tensor]:
        """The transformer's weights as mapped files: all processes of a machine share one copy."""
        tensors: dict[str, Tensor] = {}
        for file in _weights(self.folder / "transformer"):
            tensors |= load_tensors(file, str(file))
        return tensors

    @property
    def identity(self) -> Plan:
        """The plan that keeps every block."""
        return identity_plan(self.family.name, self.family.blocks(self.config))

    def vae(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> nn.Module:
        import diffusers

        _hush()
        _, name = _json(self.folder / "model_index.json")["vae"]
        model = getattr(diffusers, name).from_pretrained(
            self.folder, subfolder="vae", torch_dtype=dtype or stored_dtype(self.folder / "vae")
        )
        return cast("nn.Module", model.requires_grad_(False).eval().to(device))

    def text(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> DiffusionPipeline:
        """The pipeline with only tokenizers and text encoders, for its `encode_prompt`."""
        return load_folder(self.folder, dtype, device, without=("transformer", "vae"))

    def pipeline(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> DiffusionPipeline:
        return load_folder(self.folder, dtype, device)


def open_teacher(
    name_or_path: str | Path, options: StoreOptions | None = None, *, patient: bool = False
) -> Teacher:
    """Finds a local folder, fetches from the Hugging Face hub (`owner/model`, or `@` a branch, tag
    or commit of it), or opens a pipeline that is published in a store (`s3://bucket/prefix`,
    reached by `options`), and checks every file.

    Of one in a store the transformer's weights stay there; `patient` as for `open_store`.

    TeacherError names a file that is missing or cut short, FamilyError a transformer that cannot
    be taken apart.
    """
    name, url, hub = str(name_or_path), None, None
    remote: dict[str, JsonValue] = {}
    if "://" in name:
        url = name.rstrip("/")
        folder, remote = _brought(url, options, patient)
    else:
        folder, hub = _folder(name)
    parts = check_pipeline(folder, elsewhere=("transformer",) if url else ())
    for part in _NEEDED:
        if part not in parts:
            raise TeacherError(
                f"{folder / 'model_index.json'}: no {part}; give a whole text-to-image pipeline"
            )
    config_file = folder / "transformer" / "config.json"
    config = _json(config_file)
    family = family_of(config, str(config_file))  # before gigabytes are hashed
    teacher = Teacher(
        name=name,
        found=folder,
        digest=digest_json({**_digests(folder, "transformer", known=remote), **remote}),
        encoder_digest=digest_json(
            _digests(folder, *(p for p in parts if p.startswith(_ENCODERS)))
        ),
        family=family,
        config=config,
        url=url,
        options=options,
        hub=hub,
    )
    _whole_here[teacher.address, teacher.digest] = folder
    return teacher


def seal_pipeline(url: str, options: StoreOptions | None = None) -> Manifest:
    """Publishes a pipeline that some other tool copied to `s3://bucket/path` or a folder, as it
    lies: its manifest is all that it lacks to be opened by that URL. Every file is read once.

    Raises TeacherError for what is no pipeline, or published already, and FamilyError for one whose
    transformer cannot be taken apart.
    """
    root, _, prefix = url.rstrip("/").rpartition("/")
    store = open_store(root, options)
    if published(store, prefix) is not None:
        raise TeacherError(f"{url}: published already; `espalier best verify {url}` reads it all")
    for file in ("model_index.json", _CONFIG):
        try:
            with store.read(f"{prefix}/{file}") as stream:
                read = json.loads(stream.read())
        except MissingKey as error:
            raise TeacherError(
                f"{url}/{file}: missing; copy a whole diffusers pipeline there first"
            ) from error
        except ValueError as error:
            raise TeacherError(f"{url}/{file}: not readable as JSON: {error}") from error
    family_of(read, f"{url}/{_CONFIG}")
    return seal(store, prefix)


def open_very_teacher(address: str, digest: str, options: StoreOptions | None) -> Teacher:
    """What a worker trains against: the teacher at an address, patiently; TeacherError when another
    has taken its place since the sweep began, as one at best/BUDGET may."""
    teacher = open_teacher(address, options, patient=True)
    if teacher.digest != digest:
        raise TeacherError(
            f"teacher {address}: replaced since this sweep began (it was {digest}, now it is "
            f"{teacher.digest}); put it back, or give the sweep the address of one that stays, "
            "such as a model's own below models/"
        )
    return teacher


def check_pipeline(folder: Path, elsewhere: tuple[str, ...] = ()) -> list[str]:
    """The parts of a pipeline folder, after proving that each has its files and all are whole.

    The weights of the parts `elsewhere` are not here."""
    parts = _parts(folder)
    for part in parts:
        kind = next((kind for kind in ("scheduler", "tokenizer") if part.startswith(kind)), None)
        _json(folder / part / (f"{kind}_config.json" if kind else "config.json"))
        if part.startswith(_WEIGHTED) and part not in elsewhere:
            for file in _weights(folder / part):
                try:
                    check_safetensors(file)
                except DamagedError as error:
                    raise TeacherError(
                        f"{error}; the model cannot be used, copy or download this file again"
                    ) from error
        if kind == "tokenizer":
            _require_one_of(folder / part, "tokenizer.json", "vocab.json")
    return parts


def load_folder(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    without: tuple[str, ...] = (),
) -> DiffusionPipeline:
    """A pipeline of its own class, quiet, frozen; the parts in `without` are left out."""
    from diffusers import DiffusionPipeline

    _hush()
    weighted = [part for part in _parts(folder) if part.startswith(_WEIGHTED)]
    loaded = [part for part in weighted if part not in without]
    # A mapping by part, because the parts may be stored in different dtypes.
    dtypes = {part: dtype or stored_dtype(folder / part) for part in loaded}
    pipeline = DiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtypes, **dict.fromkeys(without)
    )
    for part in loaded:
        getattr(pipeline, part).requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def stored_dtype(part: Path) -> torch.dtype:
    """The dtype of the first floating-point weight of a part of a pipeline."""
    import torch
    from safetensors import safe_open

    floating = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for file in _weights(part):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # a handle, not a mapping
                name = tensors.get_slice(key).get_dtype()
                if name in floating:
                    return floating[name]
    return torch.float32


def _folder(name: str) -> tuple[Path, HubModel | None]:
    """The folder that a name says, and the model of the hub that it is a copy of."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), None
    known = HUB_NAME.fullmatch(name)
    if known is None or path.parent.exists():
        raise TeacherError(
            f"teacher {name}: no such folder; give a diffusers pipeline folder or a name on the "
            "Hugging Face hub such as Qwen/Qwen-Image"
        )
    # Some kilobytes tell whether tens of gigabytes would be of use.
    model, revision = known.groups()
    config = _fetched(model, revision, [_CONFIG]) / _CONFIG
    if config.is_file():
        family_of(_json(config), f"teacher {name}: {_CONFIG}")
    folder = _fetched(model, revision)
    # The hub's cache keeps every commit in a folder of its name.
    return folder, HubModel(model, folder.name)


def _fetched(name: str, revision: str | None, files: Sequence[str] = _HUB_FILES) -> Path:
    """The folder of a model of the hub in this machine's cache; what is there is not fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*files]))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        asked = f"{name}@{revision}" if revision else name
        raise TeacherError(
            f"teacher {asked}: neither a folder here nor to be had from the Hugging Face hub "
            f"({reason}); check the name, the network and your access"
        ) from error


def _published(
    url: str, options: StoreOptions | None, patient: bool
) -> tuple[Store, str, Manifest]:
    """Store, prefix and manifest of a published pipeline."""
    root, _, prefix = url.rpartition("/")
    store = open_store(root, options, patient=patient)
    manifest = published(store, prefix)
    if manifest is None:
        raise TeacherError(
            f"teacher {url}: no model is published there (it has no {MANIFEST}); give one that "
            "`espalier` has published, a folder, or a name on the Hugging Face hub; `espalier seal "
            f"{url}` makes a teacher of a pipeline that was copied there"
        )
    return store, prefix, manifest


def _is_remote(name: str) -> bool:
    """Whether a published file stays in its store."""
    return name.startswith("transformer/") and name.endswith(".safetensors")


def _brought(
    url: str, options: StoreOptions | None, patient: bool
) -> tuple[Path, dict[str, JsonValue]]:
    """The folder with what is brought here of a published pipeline, and what is not, by digest."""
    store, prefix, manifest = _published(url, options, patient)
    remote = {name: entry for name, entry in manifest.files.items() if _is_remote(name)}
    here = {name: entry for name, entry in manifest.files.items() if name not in remote}
    folder = local_copy(store, prefix, manifest.model_copy(update={"files": here}))
    return folder, {name: entry.sha256 for name, entry in remote.items()}


def _parts(folder: Path) -> list[str]:
    """The parts that a pipeline has, by its index."""
    return [
        name
        for name, value in _json(folder / "model_index.json").items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
    ]


def _weights(part: Path) -> Iterator[Path]:
    """The safetensors files of a part, sharded or not; TeacherError names one that is missing."""
    indices = sorted(part.glob("*.safetensors.index.json"))
    if indices:
        shards = _json(indices[0]).get("weight_map")
        if not isinstance(shards, Mapping):
            raise TeacherError(f"{indices[0]}: no weight_map; download this file again")
        for name in sorted(set(shards.values())):
            if not (part / name).is_file():
                raise TeacherError(f"{part / name}: missing, though {indices[0].name} names it")
            yield part / name
        return
    stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
    file = part / f"{stem}.safetensors"
    if not file.is_file():
        raise TeacherError(
            f"{file}: missing, and there is no {file.name}.index.json beside it; "
            "the weights must be safetensors files"
        )
    yield file


def _require_one_of(folder: Path, *names: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise TeacherError(f"{folder / names[0]}: missing, and so is {names[1]}")


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TeacherError(f"{file}: missing; give a whole diffusers pipeline folder") from error
    except (OSError, ValueError) as error:
        raise TeacherError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise TeacherError(f"{file}: not a JSON object")
    return data


def _digests(folder: Path, *parts: str, known: Collection[str] = ()) -> dict[str, JsonValue]:
    """SHA-256 by file name relative to the pipeline folder, but for `known` and hidden ones: those
    come and go with copies under way and with what else looks into the folder."""
    files = {
        file.relative_to(folder).as_posix(): file
        for part in parts
        for file in (folder / part).rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    return {name: _remembered_sha256(f) for name, f in files.items() if name not in known}


def _remembered_sha256(file: Path) -> str:
    """The digest from the user's cache while size and time of change are the same."""
    stat = file.stat()
    if stat.st_size < _REMEMBERED_SIZE:
        return sha256_file(file)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    identity: list[JsonValue] = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    entry = home / "espalier" / "sha256" / digest_json(identity)
    try:
        return entry.read_text()
    except OSError:
        digest = sha256_file(file)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_name(f"{entry.name}.{os.getpid()}")
        partial.write_text(digest)
        partial.replace(entry)
    except OSError:
        pass  # a cache that cannot be written only costs time
    return digest


def _hush() -> None:
    """No progress bars for loading: they would tear the live view apart."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
