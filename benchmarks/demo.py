"""What a command takes of the machine: wall time, cores, and memory above what was used before.

    python -m benchmarks.demo [COMMAND ...]

Without a command `espalier sweep examples/miniature.yaml`, the main job of `make demo`, whose
storage should be empty. Memory is the whole machine's, `MemTotal - MemAvailable` sampled ten times
a second: workers, Ray and what they share count once, and so does all else that runs meanwhile.
Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SAMPLE_SECONDS = 0.1
DEMO = ["espalier", "sweep", "examples/miniature.yaml"]


def main() -> None:
    command = sys.argv[1:] or [str(Path(sys.executable).with_name(DEMO[0])), *DEMO[1:]]
    before = peak = used()
    computed, started = core_seconds(), time.monotonic()
    with subprocess.Popen(command, stdout=sys.stderr) as running:
        while running.poll() is None:
            peak = max(peak, used())
            time.sleep(SAMPLE_SECONDS)
    seconds = time.monotonic() - started
    found = {
        "command": " ".join(command),
        "exit": running.returncode,
        "seconds": round(seconds, 1),
        "cores_busy": round((core_seconds() - computed) / seconds, 2),
        "peak_gib": round((peak - before) / 2**30, 2),
    }
    print(json.dumps(found, indent=1))
    sys.exit(running.returncode)


def used() -> int:
    """Bytes of the machine's memory that nothing else could have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return (kib["MemTotal"] - kib["MemAvailable"]) * 1024


def core_seconds() -> float:
    """That all cores have not been idle, since the machine started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
