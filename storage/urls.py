"""URLs: what those in a configuration may not hold, and folders named after them."""

from __future__ import annotations

import re

from storage.digest import digest_json

_PASSWORD = re.compile(
    r"://[^:/@]*:(?!\d{1,5}/)[^@]*@"  # user:password@host; a port ends at the path
    r"|https?://[^/@]+@"  # token@host
    r"|[?&][^=&]*(password|passwd|pwd|token|secret|signature|credential|api_?key)[^=&]*="
    r"|[?&]sig=",
    re.IGNORECASE,
)


def without_password(url: str, instead: str) -> str:
    """The URL itself; ValueError when it holds a password or token. `instead` says, to end the
    sentence, where that belongs."""
    if _PASSWORD.search(url):
        raise ValueError(f"a password does not belong into a configuration; {instead}")
    return url


def address(url: str) -> str:
    """The URL of a store, a server or data itself; ValueError when it holds a password or token."""
    return without_password(
        url, "leave it to the variables and files of the store, such as AWS_SECRET_ACCESS_KEY"
    )


def folder_name(url: str) -> str:
    """A folder's name for what belongs to a URL: readable, and another for every other URL."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", url).strip("_")
    return f"{readable}-{digest_json(url)[:8]}"
