"""A server that speaks as much of the Hugging Face hub's protocol as fetching a model takes."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" * 6 + "beef"
"""The only commit there is, 40 hex digits; `main` and the tag `v1` are it."""


@dataclass
class Hub:
    """What a test asks of the server."""

    url: str
    asked: list[str] = field(default_factory=list)
    """Paths of all requests."""


@pytest.fixture
def hub(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the tiny pipeline with a card as owner/tiny, and a machine that has nothing of
    it."""
    model = shutil.copytree(tiny_pipeline, tmp_path / "uploaded")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    with serve_hub("owner/tiny", model) as served:
        client = "huggingface_hub.constants"
        files = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{client}.ENDPOINT", served.url)
        monkeypatch.setattr(f"{client}.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(f"{client}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        yield served


@contextmanager
def serve_hub(name: str, folder: Path) -> Iterator[Hub]:
    """A hub with one model, `name`, that has the files of `folder`."""
    hub = Hub("")
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    revisions = {"main", "v1", COMMIT}
    # Listing and files of each revision, as the client of the hub asks for them.
    api, model = f"/api/models/{name}", f"/{name}/resolve"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(self.path).partition("?")[0]
            hub.asked.append(path)
            for revision in revisions:
                if path == f"{api}/revision/{revision}" or (path == api and revision == "main"):
                    return self._json({"id": name, "sha": COMMIT, "siblings": []})
                if path == f"{api}/tree/{revision}":
                    return self._json([_listed(*item) for item in sorted(files.items())])
                file = files.get(path.removeprefix(f"{model}/{revision}/"))
                if file is not None and path.startswith(f"{model}/{revision}/"):
                    return self._send(200, file.read_bytes(), {"ETag": f'"{_blob(file)}"'})
            missing = {"X-Error-Code": "RevisionNotFound" if path.startswith(api) else "Other"}
            return self._send(404, b"{}", missing)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            known = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
            for key, value in {**known, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _listed(path: str, file: Path) -> dict[str, object]:
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": _blob(file)}


def _blob(file: Path) -> str:
    """As git names a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
