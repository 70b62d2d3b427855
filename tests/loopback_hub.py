"""A small Hugging Face hub on this machine: account, one repository, commits. For tests of what is pushed."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_ThisIsVerySecretIndeed"
REPO = "me/vtg"


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the real one, without Xet. `fail[path] = [503, ...]` answers those first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.fail: dict[str, list[int]] = {}
        self.role = "write"
        self.private: bool | None = None
        """None: there is no repository yet."""
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[str] = []
        self.echo_token = False


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self._body()
        path = self.path.split("?")[0]
        if path == "/api/agent-harnesses":  # huggingface_hub's own curiosity, once per process
            self._send({})
            return
        self.server.asked.append(f"{self.command} {path}")
        if not path.startswith("/blob/"):  # a storage service of its own: the token is not its business
            self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.fail.get(path):
            self._refuse(self.server.fail[path].pop(0))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/blob/"):
            self._refuse(401)
        else:
            self._answer(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/":
            self._send({})
        elif path == "/api/whoami-v2":
            self._send({"type": "user", "name": "me", "auth": {"accessToken": {"role": hub.role}}})
        elif path == f"/api/models/{REPO}":
            files = [{"rfilename": name} for name in hub.files]
            found = {"id": REPO, "private": hub.private, "siblings": files, "sha": "0" * 40}
            self._send(found) if hub.private is not None else self._refuse(404, "RepoNotFound")
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            hub.private = hub.created[-1].get("visibility") == "private"
            self._send({"url": f"{hub.url}/{REPO}"})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif path == f"/api/models/{REPO}/preupload/main":
            self._send({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            self._send({"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]})
        elif path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = body
            self._send({})
        elif path == f"/api/models/{REPO}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.server.blobs:
            return item  # no action: it is here already
        return {**item, "actions": {"upload": {"href": f"{self.server.url}/blob/{item['oid']}?X-Signature=abcdef"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.commits.append(lines[0]["value"]["summary"])
        self._send({"commitUrl": f"{self.server.url}/{REPO}/commit/1", "commitOid": "1" * 40})

    def _refuse(self, status: int, code: str = "") -> None:
        said = self.headers.get("Authorization") if self.server.echo_token else "no"
        self._send({"error": f"{status}: {said}"}, status, {"X-Error-Code": code, "X-Error-Message": str(said)})

    def _send(self, answer: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
