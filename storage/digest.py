"""Digests that name things by what they are made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue


def digest_json(value: JsonValue) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON (sorted keys, no spaces).

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_files(paths: Sequence[Path]) -> str:
    """16 hex digits over the files' names (without folders) and contents, in the order given."""
    return digest_json([[path.name, sha256_file(path)] for path in paths])


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
