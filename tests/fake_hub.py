"""A model hub on this machine: what pushing and pulling a model uses of the Hugging Face hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_writer"


class FakeHub(ThreadingHTTPServer):
    """`models` maps USER/MODEL to its files. `with FakeHub() as hub:` serves at `hub.url` until the block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # sha256 -> content, uploaded before the commit that names it
        self.requests: list[str] = []

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    """The answer to one request."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, *match.groups())
        self.send(404, {"error": f"no route {self.command} {path}"})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send(401, {"error": "Invalid credentials"})
        return False

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if self.may_write():
            existed = name in self.server.models
            self.server.models.setdefault(name, {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(name)
            self.send(409 if existed else 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate(self, body: bytes) -> None:
        """The metadata at the top of a model card."""
        assert json.loads(body)["content"].startswith("---\nlibrary_name: kantu\n")
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        modes = {True: "lfs", False: "regular"}
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [
            {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False} for path in paths
        ]
        self.send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.send(200, {})

    def commit(self, body: bytes, name: str) -> None:
        if not self.may_write():
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.models[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.models[name][value["path"]] = self.server.large[value["oid"]]
        self.send(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/{name}/commit/0"})

    def info(self, body: bytes, name: str) -> None:
        if name not in self.server.models:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = [{"rfilename": file} for file in self.server.models[name]]
        self.send(200, {"id": name, "sha": "0" * 40, "private": False, "siblings": files, "tags": [], "downloads": 0})

    def resolve(self, body: bytes, name: str, file: str) -> None:
        content = self.server.models[name][file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(200, content, ETag=etag, X_Repo_Commit="0" * 40, Content_Type="application/octet-stream")


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "/api/repos/create", Answer.create),
    (("POST",), "/api/validate-yaml", Answer.validate),
    (("POST",), f"/api/models/{NAME}/preupload/main", Answer.preupload),
    (("POST",), f"/api/models/{NAME}/commit/main", Answer.commit),
    (("GET",), f"/api/models/{NAME}(?:/revision/main)?", Answer.info),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Answer.batch),
    (("PUT",), "/large/([0-9a-f]{64})", Answer.store),
    (("GET", "HEAD"), f"/{NAME}/resolve/[0-9a-f]+/(.+)", Answer.resolve),
]
