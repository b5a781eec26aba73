"""A hub on this machine, that answers huggingface_hub's own code as huggingface.co does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_of_mine"


@dataclass
class Hub:
    """What it has: of each repository the commits by revision, of each commit the files."""

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Files that were fetched from it."""

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit, on top of the branch. Returns its hash."""
        revisions = self.repositories.setdefault(repo_id, {})
        revisions[branch] = revisions.get(branch, {}) | files
        commit = hashlib.sha1(repr(sorted(revisions[branch].items())).encode()).hexdigest()
        revisions[commit] = revisions[branch]
        return commit

    def commit(self, repo_id: str, revision: str) -> str:
        revisions = self.repositories[repo_id]
        return next(name for name, files in revisions.items() if len(name) == 40 and files == revisions[revision])


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on the loopback."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if known := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/?]+))?(\?.*)?", self.path):
                return self.tell(known[1], known[2], known[3] or "main")
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if not found or found[1] not in hub.repositories:
                return self.refuse(401 if found else 404, "RepoNotFound")
            repo_id, revision, path = found.groups()
            if revision not in hub.repositories[repo_id]:
                return self.refuse(404, "RevisionNotFound")
            commit = {"X-Repo-Commit": hub.commit(repo_id, revision)}
            if path not in hub.repositories[repo_id][revision]:
                return self.refuse(404, "EntryNotFound", commit)
            blob = hub.repositories[repo_id][revision][path]
            if self.command == "GET":
                hub.asked.append(path)
            return self.answer(200, blob, commit | {"ETag": f'"{hashlib.sha1(blob).hexdigest()}"'})

        def tell(self, repo_id: str, what: str | None, revision: str) -> None:
            if repo_id not in hub.repositories:
                return self.refuse(401, "RepoNotFound")
            if revision not in hub.repositories[repo_id]:
                return self.refuse(404, "RevisionNotFound")
            if what != "tree":
                return self.say({"id": repo_id, "sha": hub.commit(repo_id, revision)})
            files = hub.repositories[repo_id][revision].items()
            oids = {path: hashlib.sha1(blob).hexdigest() for path, blob in files}
            return self.say([{"type": "file", "path": path, "size": len(blob), "oid": oids[path]} for path, blob in files])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(401, "")
            if self.path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                given = json.loads(body)
                repo_id = f"{given.get('organization') or 'me'}/{given['name']}"
                status = 409 if repo_id in hub.repositories else 200
                hub.repositories.setdefault(repo_id, {})
                return self.say({"url": f"{hub.address}/{repo_id}"}, status)
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)(\?.*)?", self.path)
            assert found, self.path
            repo_id, what, branch, _ = found.groups()
            if what == "preupload":
                files = json.loads(body)["files"]
                return self.say({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            lines = [json.loads(line) for line in body.splitlines()]
            new = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            commit = hub.put(repo_id, new, branch)
            return self.say({"success": True, "commitOid": commit, "commitUrl": f"{hub.address}/{repo_id}/commit/{commit}"})

        def say(self, values: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

        def answer(self, status: int, blob: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(blob))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(blob)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
