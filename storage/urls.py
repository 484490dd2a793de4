"""URLs in a configuration: what they may not hold."""

from __future__ import annotations

import re

_PASSWORD = re.compile(
    r"[^/]+://[^/@]*:[^/@]+@"  # user:password@host
    r"|https?://[^/@]+@"  # token@host
    r"|[?&](password|passwd|pwd|token|access_token)=",
    re.IGNORECASE,
)


def without_password(url: str, instead: str) -> str:
    """The URL itself; ValueError when it holds a password or token. `instead` says, to end the
    sentence, where that belongs."""
    if _PASSWORD.search(url):
        raise ValueError(f"a password does not belong into a configuration; {instead}")
    return url
