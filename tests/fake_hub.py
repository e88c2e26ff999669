"""A Hub on loopback: the endpoints that huggingface_hub's client calls to create, fill and read a model repository."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ("*.safetensors", "*.onnx", "*.onnx_data", "*.pdf", "tokenizer.json")  # stored as LFS objects


@dataclass
class Repository:
    """One repository: its files by branch, and its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """The state of the server, for tests to read and to change.

    Attributes:
        url: address of the server.
        repositories: by `owner/name`. Only `owner` may be written to.
        objects: LFS objects by SHA-256.
        fail: an answer for all requests whose path matches: (pattern, status).
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fail: tuple[str, int] | None = None


class Handler(BaseHTTPRequestHandler):
    """Answers one request. Subclasses set `hub`."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer({"error": message}, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.hub.fail and re.search(self.hub.fail[0], path):
            return self.refuse(self.hub.fail[1], "as the test asked")
        if path.startswith("/objects/"):
            self.hub.objects[path.split("/")[-1]] = body
            return self.answer({})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                repository = self.hub.repositories.get(found["id"])
                if repository is None:
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                return answer(self, found, repository, body)
        return self.refuse(404, f"the fake Hub has no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "owner":
            return self.refuse(403, f"You don't have the rights to create a model under {wanted['organization']}")
        if name in self.hub.repositories:
            return self.answer({"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def branch(self, found: re.Match, repository: Repository, _: bytes) -> None:
        if found["rev"] in repository.branches:
            return self.refuse(409, "Reference already exists")
        repository.branches[found["rev"]] = dict(repository.branches["main"])
        return self.answer({})

    def preupload(self, found: re.Match, _repository: Repository, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if any(fnmatch(file["path"], large) for large in LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.answer({"files": files})

    def lfs_batch(self, found: re.Match, _repository: Repository, body: bytes) -> None:
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"]}
            | ({} if wanted["oid"] in self.hub.objects else {"actions": self.upload_to(wanted["oid"])})
            for wanted in json.loads(body)["objects"]
        ]
        return self.answer({"transfer": "basic", "objects": objects})

    def upload_to(self, oid: str) -> dict:
        return {"upload": {"href": f"{self.hub.url}/objects/{oid}"}}

    def commit(self, found: re.Match, repository: Repository, body: bytes) -> None:
        if found["rev"] not in repository.branches:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        files = repository.branches[found["rev"]]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.url}/{found['id']}/commit/{COMMIT}"
        return self.answer({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def info(self, found: re.Match, repository: Repository, _: bytes) -> None:
        files = repository.branches["main"]
        record = {"id": found["id"], "private": repository.private, "sha": COMMIT, "tags": [], "downloads": 0}
        return self.answer(record | {"siblings": [{"rfilename": name} for name in files]})

    def tree(self, found: re.Match, repository: Repository, _: bytes) -> None:
        files = repository.branches.get(found["rev"], repository.branches["main"])
        return self.answer(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        )

    def resolve(self, found: re.Match, repository: Repository, _: bytes) -> None:
        content = repository.branches["main"].get(found["file"])
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        return self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')


_API = r"/api/models/(?P<id>[^/]+/[^/]+)"
ROUTES = {
    rf"{_API}/branch/(?P<rev>.+)": Handler.branch,
    rf"{_API}/preupload/(?P<rev>.+)": Handler.preupload,
    rf"{_API}/commit/(?P<rev>.+)": Handler.commit,
    rf"{_API}/tree/(?P<rev>[^/]+)/?": Handler.tree,
    rf"{_API}(/revision/(?P<rev>.+))?": Handler.info,
    r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)": Handler.resolve,
}


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A server that runs inside the `with` block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
