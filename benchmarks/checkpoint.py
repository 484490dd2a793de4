"""Checkpoints against what the store itself takes and gives, in one run, to a real S3 server.

    make bench-checkpoint

Ranks are processes of equal shards. In turns, several times: raw multipart puts of as many bytes,
a checkpoint, raw puts again; then, several times since they are short, raw ranged gets, a restore,
raw gets again. Each is held against the mean of the raw ones around it. Prints one JSON object;
ratios are medians over the turns, and one is of the seconds that client and server together
computed: on a machine whose cores are all busy nothing else decides, and other work on it does not
count there.

A virtual machine's host takes back memory that lies free and gives it again page by page, at up to
four seconds of the server's a GiB, to whoever writes there first. So before each part as much
memory as it may need is written and freed, and many small checkpoints tell more of speed than few
large ones, which say what memory they take.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

import psutil

from storage.s3 import _IN_FLIGHT, _PART, S3Store
from storage.store import Store, open_store
from tests.s3 import environment, serving

STEP_SECONDS = 4.3
"""Of a 10B student on 64 GPUs at 400 TFLOP/s each: a batch of 256 pictures of 1024 pixels is
256 × 4,300 tokens × (6 × 10e9 for the student + 2 × 20e9 for the teacher) FLOP. Its weights and two
moments in float32, 120 GB, are 1.75 GiB a rank."""
STEPS = 100
"""Between checkpoints."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--gib", type=float, default=0.5, help="of tensors, a rank")
    arguments.add_argument("--ranks", type=int, default=1)
    arguments.add_argument("--turns", type=int, default=10)
    arguments.add_argument("--served", type=Path, default=Path("/dev/shm"), help="where to keep it")
    arguments.add_argument("--gets", type=int, default=1, help="restores a turn")
    options = arguments.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.served) as folder,
        # Like S3 itself it hashes no whole object; rclone would at the first listing or get, and at
        # each of several gets that come together.
        serving(Path(folder) / "s3", "--etag-hash", "") as server,
    ):
        (serves,) = psutil.Process().children()
        os.environ.update(environment(server))
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(options.ranks), context.SimpleQueue()
        work = (options, f"s3://{server.bucket}/bench", serves.pid, barrier, results)
        ranks = [context.Process(target=run_rank, args=(i, *work)) for i in range(options.ranks)]
        for process in ranks:
            process.start()
        measured: list[dict[str, Any]] = []
        while len(measured) < options.ranks:
            if results.empty():
                time.sleep(0.1)
                if any(process.exitcode for process in ranks):
                    raise SystemExit("a rank failed")
            else:
                measured.append(results.get())
        for process in ranks:
            process.join()
    print(json.dumps(summary(measured, options), indent=1))


def run_rank(
    rank: int, options: argparse.Namespace, url: str, serves: int, barrier: Barrier, results: Any
) -> None:
    import torch

    from storage.checkpoint import Saver, latest_checkpoint

    torch.set_num_threads(1)
    store = open_store(url)
    # The server's time counts once.
    computing = [psutil.Process(), *([psutil.Process(serves)] if rank == 0 else [])]
    rows = int(options.gib * 2**30 / 4 / 4096 / 16)
    names = [f"rank{rank}/block{i}" for i in range(16)]
    held = {name: torch.randn(rows, 4096) for name in names}
    size = sum(tensor.nbytes for tensor in held.values())
    parts = [os.urandom(_PART) for _ in range(size // _PART)]
    # Held while a checkpoint is staged, so that what staging and sending take is told apart.
    sending = threading.Lock()
    saver = Saver(store, "run", rank=rank, world=options.ranks, keep=1, turn=sending)
    found: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, act: Callable[[], object]) -> None:
        if rank == 0:
            touch(options.served, 2 * options.ranks * size)
        barrier.wait()
        before, computed = reset_peak(), cpu_seconds(computing)
        started = time.perf_counter()
        act()
        barrier.wait()  # as long as the last rank
        found[name].append(time.perf_counter() - started)
        found[f"{name}_cpu"].append(cpu_seconds(computing) - computed)
        found[f"{name}_memory"].append(peak() - before)

    def upload() -> None:
        sending.release()
        saver.finish()

    def restore(into: dict[str, torch.Tensor]) -> None:
        latest_checkpoint(store, "run", lambda checkpoint: checkpoint.tensors.fill(into))

    for turn in range(1 + options.turns):
        timed("raw_put", lambda: raw_put(store, f"raw/{rank}", parts))
        blocked = saver.blocked
        sending.acquire()
        timed("stage", partial(saver.save, turn, {}, {"turn": turn}, own=held))
        found["blocked"].append(saver.blocked - blocked)
        timed("upload", upload)
        timed("raw_put_after", lambda: raw_put(store, f"raw/{rank}", parts))
        # Written, since pages that nobody has touched would be made during the restore.
        into = {name: torch.full((rows, 4096), math.nan) for name in names}

        for _ in range(options.gets):
            timed("raw_get", lambda: raw_get(store, f"raw/{rank}", size))
            timed("restore", partial(restore, into))
            timed("raw_get_after", lambda: raw_get(store, f"raw/{rank}", size))
            assert all(torch.equal(held[name], into[name]) for name in names)
        del into
        if not turn:  # which opened connections and files
            found.clear()
    results.put({"bytes": size, "found": dict(found)})


def touch(folder: Path, size: int) -> None:
    """Writes so many bytes in memory and frees them."""
    zeros = bytes(_PART)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(size // _PART):
            file.write(zeros)


def raw_put(store: Store, key: str, parts: Sequence[bytes]) -> None:
    """Parallel multipart puts of what is in memory, part by part: nothing is read, hashed or copied
    for them. Parts of their own, as a checkpoint has: one sent over and over stays in the cache."""
    files, bucket, name = raw(store, key)
    upload = files.call_s3("create_multipart_upload", Bucket=bucket, Key=name)["UploadId"]

    def put(number: int) -> dict[str, Any]:
        body, which = parts[number - 1], {"UploadId": upload, "PartNumber": number}
        answer = files.call_s3("upload_part", Bucket=bucket, Key=name, Body=body, **which)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        sent = list(pool.map(put, range(1, 1 + len(parts))))
    files.call_s3(
        "complete_multipart_upload", Bucket=bucket, Key=name, UploadId=upload,
        MultipartUpload={"Parts": sent},
    )  # fmt: skip


def raw_get(store: Store, key: str, size: int) -> None:
    """As many bytes by parallel ranged gets, thrown away."""
    files, bucket, name = raw(store, key)

    def get(start: int) -> int:
        return len(files.cat_file(f"{bucket}/{name}", start=start, end=start + _PART))

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        assert sum(pool.map(get, range(0, size // _PART * _PART, _PART))) == size // _PART * _PART


def raw(store: Store, key: str) -> tuple[Any, str, str]:
    s3 = cast("S3Store", store)
    return s3._files, s3._bucket, f"{s3._prefix}/{key}"


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """That they have computed so far, in their own code and in the system's for them."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def reset_peak() -> float:
    """Bytes this process holds now, from which its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> float:
    return status("VmHWM")


def status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(name)


def summary(ranks: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    size = sum(rank["bytes"] for rank in ranks)

    def each(name: str) -> Iterator[float]:
        return map(max, zip(*(rank["found"][name] for rank in ranks), strict=True))

    def around(name: str) -> Iterator[float]:
        return ((a + b) / 2 for a, b in zip(each(name), each(f"{name}_after"), strict=True))

    def computed(name: str) -> float:
        return sum(statistics.mean(rank["found"][f"{name}_cpu"]) for rank in ranks)

    def middle(values: Iterator[float]) -> float:
        return round(statistics.median(values), 3)

    def rate(times: Iterator[float]) -> float:
        return middle(size / 2**20 / seconds for seconds in times)

    def ratios(raw: str, ours: str) -> dict[str, Any]:
        found = [a / b for a, b in zip(around(raw), each(ours), strict=True)]
        cpu = (computed(raw) + computed(f"{raw}_after")) / 2 / computed(ours)
        return {
            "median": middle(iter(found)),
            "all": [round(ratio, 3) for ratio in found],
            "of_cpu_seconds": round(cpu, 3),
        }

    memory = {
        name: round(max(each(f"{name}_memory")) / 2**20)
        for name in ("stage", "upload", "restore", "raw_put", "raw_get")
    }
    blocked = middle(each("blocked"))
    return {
        "ranks": len(ranks),
        "gib_a_rank": round(size / len(ranks) / 2**30, 2),
        "turns": options.turns,
        "gets_a_turn": options.gets,
        "mib_a_second": {n: rate(around(n)) for n in ("raw_put", "raw_get")}
        | {n: rate(each(n)) for n in ("upload", "restore", "stage")},
        "cpu_seconds_a_gib": {
            name: round(computed(name) / size * 2**30, 2)
            for name in (
                "raw_put",
                "upload",
                "raw_put_after",
                "raw_get",
                "restore",
                "raw_get_after",
            )
        },
        "upload_of_raw": ratios("raw_put", "upload"),
        "restore_of_raw": ratios("raw_get", "restore"),
        "peak_extra_mib_a_rank": memory,
        "blocked_seconds": blocked,
        "step_seconds": STEP_SECONDS,
        "blocked_share": round(blocked / (STEPS * STEP_SECONDS + blocked), 4),
    }


if __name__ == "__main__":
    main()
