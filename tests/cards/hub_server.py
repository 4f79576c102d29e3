"""A small server that answers what `huggingface_hub` asks: repositories, commits, LFS, pull requests, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
_LFS = (".png", ".safetensors", ".bin")


@dataclass
class Repository:
    """Commits, the last one at the end: a name and the files of each; and pull requests."""

    commits: list = field(default_factory=lambda: [(_name("initial"), {".gitattributes": b"*.png filter=lfs\n"})])
    messages: list = field(default_factory=list)
    pull_requests: list = field(default_factory=list)

    @property
    def head(self):
        return self.commits[-1][0]

    @property
    def files(self):
        return self.commits[-1][1]

    def at(self, revision):
        return dict(self.commits).get(revision) if revision != "main" else self.files

    def commit(self, files, message=""):
        self.commits.append((_name(f"{self.head}{message}{sorted(files)}{len(self.commits)}"), files))
        self.messages.append(message)
        return self.head


@dataclass
class Failure:
    """What goes wrong at the next request whose method and path match; `times` times, after `skip` that go well."""

    pattern: str
    status: int = 0  # 0: the connection is cut in the middle of the request
    headers: dict = field(default_factory=dict)
    message: str = ""
    times: int = 1
    before: object = None  # called first: somebody else does something


class HubServer(ThreadingHTTPServer):
    """Start it with `with HubServer() as server`; `server.endpoint` is its address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: deque[Failure] = deque()
        self.waited: list[float] = []  # what the client would have slept, in seconds
        self.lock = threading.Lock()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A cut connection is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments):
        """Nothing on the terminal."""

    def handle_any(self):
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        asked = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(asked)
            failure = next((one for one in self.server.failures if re.search(one.pattern, asked)), None)
            if failure is not None:
                failure.times -= 1
                if failure.times == 0:
                    self.server.failures.remove(failure)
        if failure is not None:
            if failure.before is not None:
                failure.before()
            if failure.status:
                self.body()
                return self.answer({"error": failure.message or "failed"}, failure.status, failure.headers)
            if failure.before is None:
                self.rfile.read(min(1, int(self.headers.get("Content-Length", 0))))
                self.close_connection = True
                return self.connection.close()
        for pattern, action in _ROUTES:
            match = re.fullmatch(pattern, asked)
            if match is not None:
                return action(self, *match.groups(), query=query)
        return self.answer({"error": f"unknown: {asked}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(data)), "X-Request-Id": "1"}
        if status >= 400 and isinstance(content, dict):
            named["X-Error-Message"] = content["error"]
        for name, value in {**named, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.body()
        self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        return False

    def repository(self, name, *, read=False):
        """Return the repository, or answer why not."""
        if read and "Authorization" not in self.headers:
            pass
        elif not self.allowed():
            return None
        found = self.server.repositories.get(name)
        if found is None:
            self.body()
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return found

    def whoami(self, *, query=None):
        if self.allowed():
            self.answer({"type": "user", "name": "me", "auth": {}, "orgs": []})

    def create(self, *, query=None):
        if not self.allowed():
            return
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repositories:
            self.answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.server.repositories[name] = Repository()
        self.answer({"url": url, "name": name, "id": "1"})

    def validate(self, *, query=None):
        self.body()
        self.answer({"errors": [], "warnings": []})

    def information(self, name, revision=None, *, query=None):
        found = self.repository(name, read=True)
        if found is None:
            return
        names = [{"rfilename": file} for file in sorted(found.files)]
        self.answer({"id": name, "modelId": name, "sha": found.head, "siblings": names, "tags": [], "private": False})

    def preupload(self, name, revision, *, query=None):
        found = self.repository(name)
        if found is None:
            return
        asked = json.loads(self.body())["files"]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS) else "regular",
                "shouldIgnore": False,
                "oid": _object_name(file["path"], found.files) if file["path"] in found.files else None,
            }
            for file in asked
        ]
        self.answer({"files": files})

    def batch(self, name, *, query=None):
        if self.repository(name) is None:
            return
        objects = []
        for asked in json.loads(self.body())["objects"]:
            there = asked["oid"] in self.server.large
            upload = {"href": f"{self.server.endpoint}/storage/{asked['oid']}"}
            verify = {"href": f"{self.server.endpoint}/{name}.git/info/lfs/verify"}
            objects.append({**asked} if there else {**asked, "actions": {"upload": upload, "verify": verify}})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid, *, query=None):
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer({"error": "other bytes"}, 400)
            return
        self.server.large[oid] = data
        self.answer({})

    def verify(self, name, *, query=None):
        asked = json.loads(self.body())
        there = len(self.server.large.get(asked["oid"], b"")) == asked["size"]
        self.answer({} if there else {"error": "missing"}, 200 if there else 404)

    def commit(self, name, revision, *, query=None):
        found = self.repository(name)
        if found is None:
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = lines[0]["value"]
        with self.server.lock:
            if header.get("parentCommit", found.head) != found.head and "create_pr" not in query:
                self.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
                return
            files = dict(found.files)
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                else:
                    del files[value["path"]]
            url = f"{self.server.endpoint}/{name}"
            if "create_pr" in query:
                found.pull_requests.append((header["summary"], files))
                number = len(found.pull_requests)
                opened = {"pullRequestUrl": f"{url}/discussions/{number}", "commitOid": _name(f"pr{number}")}
                self.answer({**opened, "commitUrl": f"{url}/commit/{opened['commitOid']}", "success": True})
                return
            oid = found.commit(files, header["summary"])
        self.answer({"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, name, revision, path, *, query=None):
        found = self.repository(name, read=True)
        if found is None:
            return
        files = found.at(revision)
        if files is None:
            self.answer({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif path not in files:
            self.answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            commit = found.head if revision == "main" else revision
            self.answer(files[path], headers={"ETag": f'"{_blob(files[path])}"', "X-Repo-Commit": commit})


def _name(seed):
    return hashlib.sha1(seed.encode()).hexdigest()


def _object_name(path, files):
    return hashlib.sha256(files[path]).hexdigest() if path.endswith(_LFS) else _blob(files[path])


def _blob(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


_REPOSITORY = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_REPOSITORY}(?:/revision/(.+))?", _Handler.information),
    (rf"POST /api/models/{_REPOSITORY}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPOSITORY}/commit/(.+)", _Handler.commit),
    (rf"POST /{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"POST /{_REPOSITORY}\.git/info/lfs/verify", _Handler.verify),
    (r"PUT /storage/(\w+)", _Handler.store),
    (rf"(?:GET|HEAD) /{_REPOSITORY}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
