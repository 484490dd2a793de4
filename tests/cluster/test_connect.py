"""Joining a cluster: what leaves this machine with the job."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster.connect import ClusterError, connected


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
