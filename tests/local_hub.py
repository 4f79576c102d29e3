"""A Hub on this machine: as much of its interface as `datasets` and `huggingface_hub` ask for when they read."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


class LocalHub(ThreadingHTTPServer):
    """Data sets as `{name: {revision: {path: bytes}}}`, and models under `models/name`."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories = repositories
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name, revision):
        return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()

    def files(self, name, revision):
        """Return the files at a branch or commit, or the Hub's word for what is wrong."""
        if name not in self.repositories:
            return "RepoNotFound"
        for branch, files in self.repositories[name].items():
            if revision in (branch, self.commit(name, branch)):
                return branch, files
        return "RevisionNotFound"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] != "api":
            parts = ["api", *([] if parts[0] == "datasets" else ["models"]), *parts]
        kind, *parts = parts[1:]
        if kind not in ("datasets", "models") or len(parts) < 2:
            self.say({}, 404)
            return
        name, (what, *parts) = "/".join(parts[:2]), parts[2:] or ["revision", "main"]
        name = name if kind == "datasets" else f"{kind}/{name}"
        found = self.server.files(name, parts[0] if parts else "main")
        if isinstance(found, str):
            self.say({"error": found}, 404, {"X-Error-Code": found})
            return
        branch, files = found
        commit, path = self.server.commit(name, branch), "/".join(parts[1:])
        if what == "revision":
            self.say({"id": name, "sha": commit, "siblings": [{"rfilename": each} for each in files]})
        elif what == "tree":
            self.say(self.entries(files, path, recursive="recursive=true" in self.path.lower()))
        elif what == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            self.say([entry for entry in self.entries(files, "", recursive=True) if entry["path"] in asked])
        elif what == "resolve" and path in files:
            content = files[path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self.say(content, 200, {**headers, "Content-Length": str(len(content))})
        else:
            self.say({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    def entries(self, files, folder, recursive):
        found = {}
        for path, content in files.items():
            for above in PurePosixPath(path).parents:
                if str(above) != ".":
                    found[str(above)] = {"type": "directory", "path": str(above), "oid": "0", "size": 0}
            oid = hashlib.sha1(content).hexdigest()
            found[path] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
        inside = [entry for path, entry in found.items() if not folder or path.startswith(f"{folder}/")]
        depth = len(PurePosixPath(folder).parts) + 1
        return [entry for entry in inside if recursive or len(PurePosixPath(entry["path"]).parts) == depth]

    def say(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def local_hub(repositories, monkeypatch, cache):
    """Yield a Hub with these data sets, which `datasets` and `huggingface_hub` take for the real one."""
    import datasets
    import huggingface_hub
    import transformers.utils.hub

    hub = LocalHub(repositories)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    constants, config = huggingface_hub.constants, datasets.config
    for place, name, value in [
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "ENDPOINT", hub.url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_CACHE", str(cache / "hub")),
        (config, "HF_HUB_OFFLINE", False),
        (config, "HF_ENDPOINT", hub.url),
        (config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"),
        (config, "HF_DATASETS_CACHE", str(cache / "datasets")),
        (config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
        (config, "USE_PARQUET_EXPORT", False),
    ]:
        monkeypatch.setattr(place, name, value)
    # Made once in a process, for the Hub of then; older releases of Transformers have none.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
