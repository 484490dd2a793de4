"""Tensors that several ranks write and another number of ranks reads, as real DTensors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from storage.errors import DamagedError, StoreError
from storage.hashing import PIECE
from storage.manifest import published
from storage.shards import publish_tensors
from storage.store import open_store
from storage.stored import open_tensors

PLACEMENTS = {
    "rows": (Shard(0),),
    "columns": (Shard(1),),
    "uneven": (Shard(0),),
    "few": (Shard(0),),
    "whole": (Replicate(),),
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "rows": torch.randn(1024, 1536, generator=generator),  # over one piece
        "columns": torch.randn(6, 8, 4, generator=generator),
        "uneven": torch.randn(7, 3, generator=generator).bfloat16(),
        "few": torch.randn(2, 5, generator=generator),  # fewer rows than ranks
        "whole": torch.arange(10),
        "plain": torch.randint(0, 255, (5,), generator=generator, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "flag": torch.tensor([True, False, True]),
    }
    assert made["rows"].nbytes > PIECE
    return made


def distributed(name: str, whole: torch.Tensor, mesh) -> torch.Tensor:
    if name not in PLACEMENTS:
        return whole.clone()
    return distribute_tensor(whole.clone(), mesh, PLACEMENTS[name], src_data_rank=None)


def run_rank(rank: int, world: int, rendezvous: str, url: str, act: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    store = open_store(url)
    made = {name: distributed(name, whole, mesh) for name, whole in tensors().items()}
    if act == "write":
        publish_tensors(
            store, "p", made, {"plan.json": b"{}"}, {"n": 1}, rank=rank, world=world, token="t"
        )
        torch.distributed.barrier()
    else:
        empty = {name: torch.zeros_like(tensor) for name, tensor in made.items()}
        open_tensors(store, "p").fill(empty)
        for name, tensor in made.items():
            mine, read = (getattr(t, "_local_tensor", t) for t in (tensor, empty[name]))
            assert torch.equal(mine, read), name
    torch.distributed.destroy_process_group()


def run_ranks(tmp_path: Path, world: int, url: str, act: str) -> None:
    rendezvous = f"file://{tmp_path}/meet-{random.random()}"
    torch.multiprocessing.spawn(run_rank, (world, rendezvous, url, act), nprocs=world)


def test_another_number_of_ranks_reads_what_ranks_wrote(tmp_path, s3_url):
    run_ranks(tmp_path, 3, s3_url, "write")
    run_ranks(tmp_path, 2, s3_url, "read")
    store = open_store(s3_url)
    stored = open_tensors(store, "p")
    for name, whole in tensors().items():
        assert torch.equal(stored.read(name), whole), name
    manifest = published(store, "p")
    assert manifest is not None
    files = [name for name in manifest.files if name.endswith(".safetensors")]
    assert len(files) == 3
    assert {key[2:] for key in store.keys("p")} == {*manifest.files, "manifest.json"}
    # Each is an ordinary file of that rank's shards.
    content = store.read("p/t-rank-00001.safetensors").read()
    assert safetensors.torch.load(content)["uneven"].dtype == torch.bfloat16


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


class Counting:
    def __init__(self, store):
        self._store, self.bytes = store, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_into(self, key, start, buffer):
        self.bytes += len(buffer)
        return self._store.read_into(key, start, buffer)


def test_only_the_pieces_that_are_needed_are_read(store):
    publish_tensors(store, "p", {"a": torch.ones(PIECE), "b": torch.ones(10)}, {})
    counting = Counting(store)
    open_tensors(counting, "p").fill({"b": torch.zeros(10)})
    assert counting.bytes < PIECE


def test_floating_tensors_may_be_cast_on_the_way_out_and_in(store):
    whole = {"w": torch.randn(9), "n": torch.arange(3)}
    publish_tensors(store, "p", whole, {}, dtype=torch.bfloat16)
    back = {"w": torch.zeros(9), "n": torch.zeros(3, dtype=torch.int64)}
    stored = open_tensors(store, "p")
    stored.fill(back)
    assert stored.index["w"].dtype == "BF16"
    assert torch.equal(back["w"], whole["w"].bfloat16().float())
    assert torch.equal(back["n"], whole["n"])


def test_tensors_need_not_be_contiguous(store):
    whole = torch.arange(12.0).reshape(3, 4)
    publish_tensors(store, "p", {"w": whole.T}, {})
    target = torch.zeros(3, 4).T
    open_tensors(store, "p").fill({"w": target})
    assert torch.equal(target, whole.T)


@pytest.mark.parametrize(
    ("into", "words"),
    [
        ({"other": torch.zeros(2)}, "holds no other"),
        ({"w": torch.zeros(3)}, r"w is \[2\] there and \[3\] here"),
    ],
)
def test_tensors_of_another_model_are_refused(store, into, words):
    publish_tensors(store, "p", {"w": torch.zeros(2)}, {})
    with pytest.raises(DamagedError, match=words):
        open_tensors(store, "p").fill(into)


def test_an_altered_byte_is_named_with_its_place(store):
    publish_tensors(store, "p", {"w": torch.zeros(PIECE)}, {})
    key = "p/0-rank-00000.safetensors"
    content = bytearray(store.read(key).read())
    content[2 * PIECE + 5] ^= 1
    store.write(key, bytes(content))
    with pytest.raises(DamagedError, match=f"{key}: its bytes from {2 * PIECE} on are not"):
        open_tensors(store, "p").read("w")


def test_a_share_that_is_missing_is_not_published(store, monkeypatch):
    monkeypatch.setattr("storage.shards._PATIENCE_SECONDS", 0)
    with pytest.raises(StoreError, match=r"t-rank-00001.json: not written"):
        publish_tensors(store, "p", {"w": torch.zeros(2)}, {}, world=2, token="t")
    assert published(store, "p") is None


MEASURED = """
import json, sys
import torch
from benchmarks.checkpoint import peak, reset_peak
from storage.checkpoint import Saver, latest_checkpoint
from storage.store import open_store
store, mib = open_store(sys.argv[1]), int(sys.argv[2])
saver = Saver(store, "run")
held = {f"w{i}": torch.ones(mib // 4 * 2**18) for i in range(4)}
into = {name: torch.ones_like(tensor) for name, tensor in held.items()}
saver.save(1, {"w": torch.ones(2)}, None)
saver.finish()
before = reset_peak()
saver.save(2, held, None)
saver.finish()
latest_checkpoint(store, "run", lambda c: c.tensors.fill(into))
print(json.dumps((peak() - before) / 2**20))
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(s3_url):
    extra = {}
    for mib in (256, 1024):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, s3_url, str(mib)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        extra[mib] = json.loads(done.stdout)
    assert max(extra.values()) < 512, extra
    assert extra[1024] < extra[256] + 64, extra
