"""A stand-in of the Hugging Face hub: the part of its HTTP interface that pushing a model calls, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "a-signature-that-lets-anyone-write"
LARGE = (".safetensors", "tokenizer.json")


@dataclass
class Repository:
    """A model repository: visibility, and branch -> name -> content."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


@dataclass
class Request:
    """What the client sent."""

    method: str
    path: str
    query: str
    authorization: str | None
    body: bytes


def object_id(path: str, content: bytes) -> str:
    """The hub's name of a file's content: SHA-256 in the large-file storage, git's own name elsewhere."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The hub, with one token that may write for one user. `fails(request)` is a status in place of an answer, or 0."""

    def __init__(self, token: str, user: str = "anna"):
        self.token, self.user = token, user
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fails: Callable[[Request], int] = lambda request: 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def uploads(self) -> list[str]:
        """The objects that were sent to the large-file storage, in order."""
        return [request.path.rsplit("/", 1)[1] for request in self.requests if request.method == "PUT"]

    def answer(self, request: Request) -> tuple[int, Any]:
        """(status, body) of a request."""
        if request.method == "PUT":  # the storage trusts the signature of its address, as S3 does
            return self._store(request)
        if request.authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        for method, pattern, answer in ROUTES:
            if request.method == method and (found := re.fullmatch(pattern, request.path)):
                return answer(self, request, *map(unquote, found.groups()))
        return 404, {"error": f"the stand-in does not know {request.method} {request.path}"}

    # ---- each call ----

    def _who(self, request: Request) -> tuple[int, Any]:
        return 200, {"type": "user", "name": self.user, "orgs": []}

    def _create(self, request: Request) -> tuple[int, Any]:
        wanted = json.loads(request.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != self.user:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {name}"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Repository(wanted.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _branch(self, request: Request, name: str, branch: str) -> tuple[int, Any]:
        branches = self.repositories[name].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def _tree(self, request: Request, name: str, branch: str) -> tuple[int, Any]:
        files = self.repositories[name].branches[branch]
        return 200, [
            {"type": "file", "path": path, "size": len(content), "oid": object_id(path, content)}
            for path, content in files.items()
        ]

    def _info(self, request: Request, name: str, branch: str = "main") -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        names = [{"rfilename": path} for path in repository.branches[branch]]
        sha = (repository.commits or ["0" * 40])[-1]
        return 200, {"id": name, "sha": sha, "private": repository.private, "siblings": names, "tags": []}

    def _yaml(self, request: Request) -> tuple[int, Any]:
        content = json.loads(request.body)["content"]
        return (200, {"errors": [], "warnings": []}) if content.startswith("---\n") else (400, {"errors": []})

    def _preupload(self, request: Request, name: str, branch: str) -> tuple[int, Any]:
        there = self.repositories[name].branches[branch]
        files = []
        for path in (file["path"] for file in json.loads(request.body)["files"]):
            mode = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            files.append(mode | ({"oid": object_id(path, there[path])} if path in there else {}))
        return 200, {"files": files}

    def _batch(self, request: Request, name: str) -> tuple[int, Any]:
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            oid = wanted["oid"]
            upload = {"href": f"{self.url}/storage/{oid}?X-Amz-Signature={SIGNATURE}", "header": {}}
            verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"}
            objects.append(wanted | ({} if oid in self.stored else {"actions": {"upload": upload, "verify": verify}}))
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, request: Request) -> tuple[int, Any]:
        oid = request.path.rsplit("/", 1)[1]
        if parse_qs(request.query) != {"X-Amz-Signature": [SIGNATURE]}:
            return 403, "no signature"
        if hashlib.sha256(request.body).hexdigest() != oid:
            return 400, "not the content that was announced"
        self.stored[oid] = request.body
        return 200, ""

    def _verify(self, request: Request, name: str) -> tuple[int, Any]:
        return (200, {}) if json.loads(request.body)["oid"] in self.stored else (404, {})

    def _commit(self, request: Request, name: str, branch: str) -> tuple[int, Any]:
        repository = self.repositories[name]
        files = dict(repository.branches[branch])
        for line in map(json.loads, request.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[branch] = files
        repository.commits.append(hashlib.sha1(request.body).hexdigest())
        oid = repository.commits[-1]
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _serve(self) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(self.command, url.path, url.query, self.headers.get("Authorization"), body)
                hub.requests.append(request)
                failed = hub.fails(request)
                status, answer = (failed, {"error": "not now"}) if failed else hub.answer(request)
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = _serve

        return Handler


NAME = r"([^/]+/[^/]+?)"
ROUTES: list[tuple[str, str, Callable[..., tuple[int, Any]]]] = [
    ("GET", "/api/whoami-v2", Hub._who),
    ("POST", "/api/repos/create", Hub._create),
    ("POST", "/api/validate-yaml", Hub._yaml),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Hub._branch),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", Hub._tree),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Hub._info),
    ("GET", rf"/api/models/{NAME}", Hub._info),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Hub._preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Hub._commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub._batch),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", Hub._verify),
]
