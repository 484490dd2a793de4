"""Joins a Ray cluster for the length of a command, or starts one on this machine.

`RAY_ADDRESS` names a cluster; without it a local Ray uses the machine's processors and GPUs.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from storage.errors import EspalierError

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a local Ray. Weights and latents travel through the store, not through Ray;
only small batches of pictures pass here."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""Ray, Tune and the model libraries report to us; the terminal shows what we make of it."""

BEHAVIOUR = {
    # Tune would answer Ctrl-C itself and go on with the next stage.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Relative paths in a config mean the same in a worker as here.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

LOCAL = {
    # An actor that would watch for the end of the very machine it runs on.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # What a dashboard shows, and a local Ray has none.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}
"""What a Ray on this machine does without: its own processes share the cores that train."""

PASSED_ON = (
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
"""Variables that workers on other machines get from this one. No credential is among them: Ray
shows a job's environment to everybody on its dashboard, so each node must bring its own."""


class ClusterError(EspalierError):
    """No Ray cluster that this sweep could run on."""


@contextmanager
def connected(accelerator: Literal["cpu", "gpu"]) -> Iterator[None]:
    """Ray is up inside the block, and left or stopped after it.

    Raises:
        ClusterError: RAY_ADDRESS does not answer, or `gpu` is asked for and there is none.
    """
    prepare_environment()
    import ray

    address = os.environ.get("RAY_ADDRESS") or None
    arguments: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        _set(LOCAL)
        arguments |= {
            "num_cpus": processors(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        arguments["runtime_env"] = {"env_vars": passed | QUIET | BEHAVIOUR}
    try:
        # "local" keeps Ray from joining whatever cluster it finds running on this machine.
        ray.init(address=address or "local", **arguments)
    except Exception as error:  # Ray raises a plain Exception when its node does not come up
        where = f"RAY_ADDRESS={address}" if address else "a local Ray"
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ClusterError(f"{where} does not answer ({reason}); try again or check it") from error
    try:
        _quieten()
        if accelerator == "gpu" and not ray.cluster_resources().get("GPU"):
            raise ClusterError(
                "accelerator: gpu, but the Ray cluster has none; add a machine with a GPU or set "
                "accelerator: cpu"
            )
        yield
    finally:
        ray.shutdown()


@contextmanager
def core_kept_quiet() -> Iterator[None]:
    """Keeps all that is written to this process's stderr, and shows it only after a failure that
    does not explain itself.

    Ray's core writes past Python, straight to the descriptor, into the middle of the live view; one
    such line comes with every encode and means nothing.
    """
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        except (EspalierError, KeyboardInterrupt):
            failed = False  # says itself what is wrong
            raise
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)
            if failed:
                kept.seek(0)
                os.write(2, kept.read())


def prepare_environment() -> None:
    """Sets what Ray and its workers read at their start; a variable that is set already stays."""
    _set(QUIET | BEHAVIOUR)


def processors() -> int:
    """Processors this process may use: containers and `taskset` allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _set(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _quieten() -> None:
    for name in ("ray", "ray.tune", "ray.train", "ray.data", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
