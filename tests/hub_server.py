"""A stand-in of the Hugging Face hub on the loopback address, for one dataset repository.

It speaks what huggingface_hub's own client sends without xet: repos/create, tree, preupload, Git
LFS's batch API, uploads and commits. Parquet files are LFS objects.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
      files: path -> content, of the repository.
      objects: SHA-256 -> content, uploaded.
      commits: paths of every commit, in order.
      private: as the repository was made; None before.
      failing: number of commits after which the server answers 400.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.uploads: list[str] = []
        self.private: bool | None = None
        self.failing: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()


def _is_lfs(path: str) -> bool:
    return path.endswith(".parquet")


def _entry(path: str, content: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": git}
    if _is_lfs(path):
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {"lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
    return entry


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self._answer([_entry(path, data) for path, data in sorted(self.server.files.items())])
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.server.uploads.append(oid)
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        hub = self.server
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            if hub.private is not None:
                self._answer({"error": "exists", "url": f"{hub.url}/datasets/me/it"}, 409)
                return
            hub.private = private
            self._answer({"url": f"{hub.url}/datasets/me/it", "name": "me/it", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                if item["oid"] not in hub.objects:
                    href = {"href": f"{hub.url}/lfs/{item['oid']}"}
                    item["actions"] = {"upload": href}
                objects.append(item)
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer({"error": self.path}, 404)

    def _commit(self, body: bytes) -> None:
        hub = self.server
        if hub.failing is not None and len(hub.commits) >= hub.failing:
            self._answer({"error": "no room"}, 400)
            return
        paths = []
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
            if item["key"] != "header":
                paths.append(value["path"])
        hub.commits.append(paths)
        oid = f"{len(hub.commits):040d}"
        url = f"{hub.url}/datasets/me/it/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})
