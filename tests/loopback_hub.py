"""A Hub on the loopback interface: as much of its HTTP API as `huggingface_hub` uses to publish and to load.

    with LoopbackHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(home)})
        hub.repositories["user/name"].files  # {path: content}

It keeps all in memory. Files of `LFS_SUFFIXES` go by LFS, as on the Hub. `hub.requests` lists what was asked for, and
`hub.fail` makes it break off.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopbackloopbackloopbackloopback"
LFS_SUFFIXES = (".safetensors", ".onnx", ".bin")
INITIAL_COMMIT = "0" * 40


@dataclass
class Repository:
    private: bool = False
    sdk: str | None = None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, list[str]] = field(default_factory=lambda: {"main": [INITIAL_COMMIT]})

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def branch_of(self, revision: str) -> str | None:
        """The branch that a name or a branch's newest commit stands for."""
        for branch, commits in self.commits.items():
            if revision in (branch, commits[-1]):
                return branch
        return None


def oid(path: str, content: bytes) -> str:
    """How the Hub names a content: SHA-256 for LFS, git's SHA-1 for the rest."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # "user/name"; a Space's is "spaces/user/name"
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[tuple[str, str]] = []  # method and path
        self.failures: dict[tuple[str, str], int] = {}
        self.token = TOKEN  # that lets one write
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that a process is to be started with, to talk to this Hub and to keep its files in `home`."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def fail(self, method: str, path_part: str, times: int = 1) -> None:
        """Breaks off in the middle of the next `times` requests of `method` whose path has `path_part`."""
        self.failures[method, path_part] = times

    def uploads(self) -> list[tuple[str, str]]:
        """The requests that brought content."""
        return [(method, path) for method, path in self.requests if method == "PUT" or "/commit/" in path]


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        for (failing, part), left in self.hub.failures.items():
            if failing == method and part in path and left > 0:
                self.hub.failures[failing, part] = left - 1
                self.rfile.read(min(64, int(self.headers.get("Content-Length", 0))))
                self.close_connection = True
                return self.connection.close()
        body = self._body()
        if (method, path) == ("POST", "/api/validate-yaml"):
            return self._validate_yaml(json.loads(body))
        if (method, path) == ("GET", "/api/whoami-v2"):
            return self._json({"name": "user", "type": "user", "orgs": []}) if self._may_write() else None
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        if method == "PUT" and path.startswith("/lfs/"):
            self.hub.objects[hashlib.sha256(body).hexdigest()] = body
            return self._json({})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(body))
        words = path.strip("/").split("/")
        if words[0] == "api":
            return self._api(method, words[1:], body)
        return self._resolve(method, words)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(content).encode(), status, **{"Content-Type": "application/json", **headers})

    def _bytes(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
        self._json({"error": message}, status, **headers)

    def _may_write(self) -> bool:
        """Whether the request comes with the token; if not, it is refused."""
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not allowed:  # with what no server should send back
            self._error(401, f"Invalid credentials: {self.headers.get('Authorization')}")
        return allowed

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(404, "Repository not found", "RepoNotFound")
        return repository

    def _validate_yaml(self, request: dict) -> None:
        front_matter = request["content"].split("---")[1] if request["content"].startswith("---") else ""
        try:
            metadata = yaml.safe_load(front_matter)
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        empty = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self._json({"errors": [], "warnings": empty})

    def _create(self, request: dict) -> None:
        if not self._may_write():
            return None
        kind = request.get("type", "model")
        name = f"{request['organization']}/{request['name']}"
        key = name if kind == "model" else f"{kind}s/{name}"
        url = f"{self.hub.endpoint}/{key}"
        if key in self.hub.repositories:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        private = request.get("private", request.get("visibility") == "private")
        self.hub.repositories[key] = Repository(private=bool(private), sdk=request.get("sdk"))
        return self._json({"url": url, "name": name, "id": name})

    def _lfs_batch(self, request: dict) -> None:
        if not self._may_write():
            return
        objects = []
        for wanted in request["objects"]:
            actions = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            there = wanted["oid"] in self.hub.objects
            objects.append({**wanted, **({} if there else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _api(self, method: str, words: list[str], body: bytes) -> None:
        """/api/{models,spaces}/USER/NAME[/ACTION/REVISION[/PATH]]"""
        kind, name, rest = words[0], "/".join(words[1:3]), words[3:]
        repository = self._repository(name if kind == "models" else f"{kind}/{name}")
        if repository is None:
            return None
        action, revision = (rest[0], "/".join(rest[1:2])) if rest else ("revision", "main")
        if method == "POST" and not self._may_write():
            return None
        if (method, action) == ("POST", "branch"):
            if revision in repository.branches:
                return self._error(409, "Reference already exists")
            repository.branches[revision] = dict(repository.files)
            repository.commits[revision] = list(repository.commits["main"])
            return self._json({})
        branch = repository.branch_of(revision)
        if branch is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if action == "revision":
            return self._json(self._info(name, repository, branch))
        if action == "tree":
            return self._json(self._tree(repository.branches[branch]))
        if action == "preupload":
            return self._preupload(json.loads(body), repository.branches[branch])
        if action == "commit":
            return self._commit(body, name, repository, branch)
        return self._error(404, f"not in this Hub: {method} {self.path}")

    @staticmethod
    def _info(name: str, repository: Repository, branch: str) -> dict:
        siblings = [{"rfilename": path} for path in repository.branches[branch]]
        sha = repository.commits[branch][-1]
        return {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}

    @staticmethod
    def _tree(files: dict[str, bytes]) -> list[dict]:
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": oid(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def _preupload(self, request: dict, files: dict[str, bytes]) -> None:
        answer = []
        for file in request["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            there = {"oid": oid(path, files[path])} if path in files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        self._json({"files": answer})

    def _commit(self, body: bytes, name: str, repository: Repository, branch: str) -> None:
        files = dict(repository.branches[branch])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(repository.commits[branch][-1].encode() + body).hexdigest()
        repository.branches[branch] = files
        repository.commits[branch].append(commit)
        return self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def _resolve(self, method: str, words: list[str]) -> None:
        """/[spaces/]USER/NAME/resolve/REVISION/PATH"""
        if "resolve" not in words:
            return self._error(404, f"not in this Hub: {method} {self.path}")
        at = words.index("resolve")
        repository = self._repository("/".join(words[:at]))
        if repository is None:
            return None
        if repository.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error(404, "Repository not found", "RepoNotFound")
        branch, path = repository.branch_of(words[at + 1]), "/".join(words[at + 2 :])
        if branch is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        content = repository.branches[branch].get(path)
        commit = {"X_Repo_Commit": repository.commits[branch][-1]}
        if content is None:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", **commit)
        etag = f'"{oid(path, content)}"'
        linked = {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content))} if path.endswith(LFS_SUFFIXES) else {}
        return self._bytes(content, ETag=etag, **commit, **linked)
