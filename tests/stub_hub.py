"""A hub on localhost: the part of its HTTP interface that huggingface_hub's upload uses, with failures on request.

with stub_hub(monkeypatch) as hub:
    hub.fail = lambda method, path: 503 if method == "PUT" else None
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_" + "SecretOfTheTests" * 2
DROP = -1
"""A failure: the connection breaks in the middle of the body."""
STALL, STALL_INSIDE = -2, -3
"""Failures: nothing is answered, or the answer stops after its headers. The connection stays open."""


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=lambda: {"main": {}})
    """Of each branch the files, each with whether it is in LFS."""
    titles: dict[str, str] = field(default_factory=dict)
    """Of each file the title of the last commit that touched it."""


@dataclass
class StubHub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fail: Callable[[str, str], int | None] = lambda method, path: None
    after: Callable[[str, str], int | None] = lambda method, path: None
    """A failure after the request was carried out."""
    spoil: Callable[[str, dict[str, Any]], dict[str, Any] | None] = lambda path, entry: entry
    """What the listing says of a file; None: nothing."""
    hidden: set[str] = field(default_factory=set)
    """Repositories that the token cannot see."""
    forced_private: bool | None = None
    refuse_objects: bool = False
    """Whether each LFS object is refused, in an answer of status 200."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of failures."""
    closing: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str, part: str) -> int:
        return sum(sent == method and part in path for sent, path in self.requests)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return {name: content for name, (content, _) in self.repos[repo].branches[branch].items()}


def _last_commit(title: str) -> dict[str, Any]:
    return {"lastCommit": {"id": "0" * 40, "title": title, "date": "2026-01-02T03:04:05.000Z"}}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        method, path = self.command, unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        status = self.hub.fail(method, path)
        if status == DROP:
            self.rfile.read(16)
            self.close_connection = True
            self.connection.close()
            return None
        body = self._body()
        if status in (STALL, STALL_INSIDE):
            if status == STALL_INSIDE:
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.flush()
            self.close_connection = True
            self.hub.closing.wait(300)
            return None
        if status is not None:
            return self._echo(status)
        if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._echo(401)
        done, answer = self._route(method, path, body)
        if (late := self.hub.after(method, path)) is not None:
            return self._echo(late)
        if done == 404:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self._send(done, answer)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _echo(self, status: int) -> None:
        """A failure that shows the token wherever a server can put text."""
        said = f"no: Authorization Bearer {TOKEN}"
        headers = {"X-Error-Message": said, "X-Request-Id": TOKEN, "X-HF-Warning": f"auth; {said}", "Warning": said}
        headers |= self.hub.headers
        self._send(status, {"error": said, "errors": [{"message": said}]}, headers)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = b"" if self.command == "HEAD" else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.hub
        if method == "HEAD":
            return 200, None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repos:
                return 409, {"error": "You already created this model repo"}
            private = asked["visibility"] == "private" if hub.forced_private is None else hub.forced_private
            hub.repos[name] = Repo(private)
            return 200, {"url": f"{hub.url}/{name}"}
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            yaml.safe_load(text.split("---\n")[1])
            return 200, {"errors": [], "warnings": [{"message": f"of {TOKEN}"}]}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._lfs(item) for item in json.loads(body)["objects"]]}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.stored[oid] = body
            return 200, {}
        if path == "/lfs-verify":
            return (200, {}) if json.loads(body)["oid"] in hub.stored else (400, {})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|branch|preupload|commit|tree)/([^/]+))?", path)
        if found is None:  # what the library asks beside: who it runs for
            return 404, None
        name, action, revision = found.groups()
        if name not in hub.repos or name in hub.hidden:
            return 404, None
        return self._model(hub.repos[name], name, action, revision, body)

    def _lfs(self, item: dict[str, Any]) -> dict[str, Any]:
        if self.hub.refuse_objects:
            return {**item, "error": {"code": 422, "message": f"no: Authorization Bearer {TOKEN}"}}
        links = {
            "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
            "verify": {"href": f"{self.hub.url}/lfs-verify"},
        }
        return item if item["oid"] in self.hub.stored else {**item, "actions": links}

    def _model(self, repo: Repo, name: str, action: str | None, revision: str, body: bytes) -> tuple[int, Any]:
        if action in (None, "revision"):
            if (revision or "main") not in repo.branches:
                return 404, None
            files = repo.branches[revision or "main"]
            return 200, {"id": name, "private": repo.private, "sha": self._commit(files), "siblings": []}
        if action == "branch":
            if revision in repo.branches:
                return 409, {"error": "exists"}
            repo.branches[revision] = dict(repo.branches["main"])
            return 200, {}
        if action == "tree":
            expand = "expand=true" in self.path.lower()
            entries = [
                self._entry(path, *file) | (_last_commit(repo.titles.get(path, "Add it")) if expand else {})
                for path, file in self.hub.commits[revision].items()
            ]
            return 200, [kept for entry in entries if (kept := self.hub.spoil(entry["path"], entry)) is not None]
        files = repo.branches[revision]
        if action == "preupload":
            return 200, {"files": [self._mode(item, files) for item in json.loads(body)["files"]]}
        entries = [json.loads(line) for line in body.splitlines()]
        header = next(entry["value"] for entry in entries if entry["key"] == "header")
        if header.get("parentCommit") not in (None, self._commit(files)):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        if any(entry["key"] == "deletedFile" and entry["value"]["path"] not in files for entry in entries):
            return 404, None
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                files[value["path"]] = (self.hub.stored[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            if entry["key"] != "header":
                repo.titles[value["path"]] = header["summary"]
        commit = self._commit(files)
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit}

    def _commit(self, files: dict[str, tuple[bytes, bool]]) -> str:
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.hub.commits[oid] = dict(files)
        return oid

    def _mode(self, item: dict[str, Any], files: dict[str, tuple[bytes, bool]]) -> dict[str, Any]:
        mode = "lfs" if item["path"].endswith((".safetensors", ".gguf")) else "regular"
        there = files.get(item["path"])
        oid = None
        if there is not None:
            oid = hashlib.sha256(there[0]).hexdigest() if there[1] else git_hash(there[0])
        return {"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _entry(self, path: str, content: bytes, lfs: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if lfs:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry


def write_gguf(path: Path, adapter: str | None, kind: str = "model", sealed: bool = True, **keys: str) -> Path:
    """A small GGUF file that says what it was made of, with the hash of what was written."""
    import gguf
    import numpy

    from tunesmith.export.gguf import SEAL, UNSEALED, seal

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for key, value in ({"tunesmith.adapter_hash": adapter} if adapter else {}).items() | keys.items():
        writer.add_string(key, value)
    if sealed:
        writer.add_string(SEAL, UNSEALED)
    writer.add_tensor("token_embd.weight", numpy.arange(64, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if sealed:
        seal(path)
    return path


@contextmanager
def stub_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A running hub that this process's huggingface_hub talks to, with `TOKEN`, over plain LFS, without waiting."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    # The library reads its environment when it is imported, which was long ago here.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()
