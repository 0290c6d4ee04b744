"""A hub on this machine: the requests that huggingface_hub makes to create, fill and read repositories, xet off."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "t" * 34


@dataclass
class Hub:
    """What it holds: repository -> branch -> file -> content, large contents by their hash, and all requests."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""


def commit_of(files: dict[str, bytes]) -> str:
    """A commit, by what it holds."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.route(b"")

        def do_HEAD(self):
            self.route(b"")

        def do_POST(self):
            self.route(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        do_PUT = do_POST

        def route(self, body: bytes) -> None:
            at = urlsplit(self.path)
            words, query = [unquote(w) for w in at.path.strip("/").split("/")], parse_qs(at.query)
            hub.asked.append(f"{self.command} {at.path}")
            writes = self.command in ("POST", "PUT") and words[:2] != ["api", "validate-yaml"]
            if writes and words[0] != "large" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send({"error": "Invalid credentials"}, 401)
            match words:
                case ["api", "repos", "create"]:
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
                    if name in hub.repositories:
                        return self.send(
                            {"error": "You already created this repo", "url": f"{hub.address}/{name}"}, 409
                        )
                    hub.repositories[name] = {"main": {}}
                    return self.send({"url": f"{hub.address}/{name}"})
                case ["api", "validate-yaml"]:
                    return self.send({"errors": [], "warnings": []})
                case ["api", "models", org, name, "branch", branch]:
                    branches = hub.repositories[f"{org}/{name}"]
                    branches.setdefault(branch, dict(branches["main"]))
                    return self.send({})
                case ["api", "models", org, name, "preupload", branch]:
                    files = [
                        {"path": f["path"], "shouldIgnore": False, "uploadMode": mode(f["path"])}
                        for f in json.loads(body)["files"]
                    ]
                    return self.send({"files": files})
                case [org, git, "info", "lfs", "objects", "batch"] if git.endswith(".git"):
                    found = []
                    for thing in json.loads(body)["objects"]:
                        upload = {"href": f"{hub.address}/large/{thing['oid']}"}
                        found.append({**thing, "actions": {"upload": upload}})
                    return self.send({"transfer": "basic", "objects": found})
                case ["large", oid]:
                    assert hashlib.sha256(body).hexdigest() == oid
                    hub.large[oid] = body
                    return self.send({})
                case ["api", "models", org, name, "commit", branch]:
                    return self.commit(f"{org}/{name}", branch, body, "create_pr" in query)
                case ["api", "models", org, name, *rest]:
                    return self.about(f"{org}/{name}", rest)
                case [org, name, "resolve", revision, *path]:
                    files = self.files(f"{org}/{name}", revision)
                    return self.file(files, "/".join(path)) if files is not None else self.missing()
            return self.missing()

        def commit(self, name: str, branch: str, body: bytes, pull: bool) -> None:
            files = dict(hub.repositories[name][branch])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            hub.repositories[name]["refs/pr/1" if pull else branch] = files
            found = {"commitUrl": f"{hub.address}/{name}/commit/{commit_of(files)}", "commitOid": commit_of(files)}
            self.send({**found, **({"pullRequestUrl": f"{hub.address}/{name}/discussions/1"} if pull else {})})

        def files(self, name: str, revision: str) -> dict[str, bytes] | None:
            branches = hub.repositories.get(name, {})
            commits = {commit_of(files): files for files in branches.values()}
            return branches.get(revision, commits.get(revision))

        def about(self, name: str, rest: list[str]) -> None:
            revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
            if (files := self.files(name, revision)) is None:
                self.missing()
            elif rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
                self.send(tree)
            else:
                found = {"id": name, "sha": commit_of(files), "private": hub.private[name]}
                self.send({**found, "siblings": [{"rfilename": n} for n in files]})

        def file(self, files: dict[str, bytes], name: str) -> None:
            if name not in files:
                self.missing("EntryNotFound")
            else:
                etag = hashlib.sha256(files[name]).hexdigest()
                self.send(files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files)})

        def missing(self, code: str = "RepoNotFound") -> None:
            self.send({"error": code}, 404, {"X-Error-Code": code})

        def send(self, found: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            kind = {} if isinstance(found, bytes) else {"Content-Type": "application/json"}
            for key, value in {**kind, **(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def mode(path: str) -> str:
    """How a file is stored, by its name, as the hub's .gitattributes do."""
    return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
