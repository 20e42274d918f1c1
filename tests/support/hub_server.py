"""A Hugging Face Hub on this machine: enough of its protocol to download and upload small repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

Files = dict[str, bytes]
_ANSWERS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "Down": 503}


@dataclass
class Hub:
    """Repositories of the server: for each a list of (commit, files), the last of which is the main branch."""

    repositories: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    down: bool = False
    port: int = 0

    def add(self, repository: str, files: Files | Path) -> str:
        """Commit files, or those of a folder; the result is the commit's hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        commits = self.repositories.setdefault(repository, [])
        digest = hashlib.sha1(repr((repository, len(commits), sorted(files))).encode()).hexdigest()
        commits.append((digest, files))
        return digest

    def commit(self, repository: str, revision: str) -> tuple[str, Files]:
        if self.down:
            raise KeyError("Down")
        if not self.repositories.get(repository):
            raise KeyError("RepoNotFound")
        commits = self.repositories[repository]
        found = commits[-1:] if revision == "main" else [pair for pair in commits if pair[0] == revision]
        if not found:
            raise KeyError("RevisionNotFound")
        return found[0]


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to inside the block, and an empty cache for what it downloads."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_port
    endpoint = f"http://127.0.0.1:{hub.port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                commit, files = self.hub.commit(match[1], match[2] or "main")
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": match[1], "modelId": match[1], "sha": commit, "siblings": siblings, "tags": []})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                _, files = self.hub.commit(match[1], match[2])
                self._json([{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                commit, files = self.hub.commit(match[1], match[2])
                if match[3] not in files:
                    raise KeyError("EntryNotFound")
                data = files[match[3]]
                self._answer(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit})
                if self.command == "GET":
                    self.hub.downloads.append(match[3])
            else:
                raise KeyError("EntryNotFound")
        except KeyError as error:
            self._answer(_ANSWERS[error.args[0]], b"{}", {"X-Error-Code": error.args[0]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.down:
            self._answer(503, b"{}", {"X-Error-Code": "Down"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else wish["name"]
            self.hub.repositories.setdefault(name, [])
            self.hub.private[name] = wish.get("private", wish.get("visibility") == "private")
            self._json({"url": f"http://127.0.0.1:{self.hub.port}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            commit = self.hub.add(match[1], {file["path"]: base64.b64decode(file["content"]) for file in sent})
            url = f"http://127.0.0.1:{self.hub.port}/{match[1]}/commit/{commit}"
            self._json({"success": True, "commitUrl": url, "commitOid": commit})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
