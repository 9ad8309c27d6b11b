"""A model hub on this machine's loopback interface, as much of one as pushing and loading a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class LoopbackHub:
    """Repositories, their branches as commits, each a dict of files; ``with`` serves them at ``url``."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}  # by repository
        self.branches: dict[tuple[str, str], str] = {}  # (repository, branch) to commit
        self.commits: dict[str, dict[str, bytes]] = {}  # commit to files
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[repository, branch]]

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        identity = hashlib.sha1(f"{repository} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[identity] = files
        self.branches[repository, branch] = identity
        return identity

    def find(self, repository: str, revision: str) -> str | None:
        """The commit that a branch or a commit's own name stands for."""
        return revision if revision in self.commits else self.branches.get((repository, revision))

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.hub.commit(found[1], found[2], dict(self.hub.files(found[1])))
            return self.answer(200, {})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self.add_commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        return self.missing("NotFound")

    def create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.private:
            return self.answer(409, url)
        self.hub.private[name] = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.commit(name, "main", {})
        return self.answer(200, url)

    def add_commit(self, name: str, branch: str, lines: list[dict]) -> None:
        files = dict(self.hub.files(name, branch))
        for line in lines:
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                assert line["key"] == "file", line["key"]
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        identity = self.hub.commit(name, branch, files)
        url = f"{self.hub.url}/{name}/commit/{identity}"
        self.answer(200, {"success": True, "commitOid": identity, "commitUrl": url, "hookOutput": ""})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
            commit = self.hub.find(found[1], found[2])
            files = {} if commit is None else self.hub.commits[commit]
            kinds = [{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in files.items()]
            return self.answer(200, kinds, Content_Type="application/json")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            commit = self.hub.find(found[1], found[2] or "main")
            if commit is None:
                return self.missing("RepoNotFound" if found[1] not in self.hub.private else "RevisionNotFound")
            names = [{"rfilename": name} for name in self.hub.commits[commit]]
            return self.answer(200, {"id": found[1], "sha": commit, "siblings": names, "tags": []})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(found[1], found[2], found[3])
        return self.missing("RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, name: str, revision: str, path: str) -> None:
        commit = self.hub.find(name, revision)
        if commit is None:
            return self.missing("RepoNotFound" if name not in self.hub.private else "RevisionNotFound")
        content = self.hub.commits[commit].get(path)
        if content is None:
            return self.missing("EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, ETag=etag, X_Repo_Commit=commit)
