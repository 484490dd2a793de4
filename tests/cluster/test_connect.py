"""Joining a cluster: what leaves this machine with the job."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
import ray

from cluster.connect import ClusterError, connected, core_kept_quiet


def test_no_credential_becomes_part_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        asked.update(arguments)
        raise ConnectionError("nobody answers")

    # Only what Ray is told matters here; a real cluster would not say.
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, f"secret of {name}")
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=ray\.example:6379"), connected("cpu"):
        pass
    assert asked["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "https://store.example"
    assert "secret" not in repr(asked)


def test_what_the_core_writes_is_shown_only_after_a_failure(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def written(error: Exception | None) -> str:
        with suppress(ClusterError, MemoryError), core_kept_quiet():
            os.write(2, b"a line of the core\n")
            if error is not None:
                raise error
        return capfd.readouterr().err

    assert written(None) == ""
    assert written(ClusterError("a sentence")) == ""
    assert written(MemoryError()) == "a line of the core\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
