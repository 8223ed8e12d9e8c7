"""A Hub on the loopback interface, for the real client: reading, range by range, and uploading.

Two servers run: one with the endpoints of the Hub, and one, of another origin, that stands for the
storage that the Hub redirects to. Every request is written down, and can be made to fail.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_repositories import (
    LFS_SUFFIXES,
    Blob,
    Commit,
    HubRepository,
    Json,
    blobs_of,
    card_data,
)

TOKEN = "hf_loopback"
"""A token that may read and write everything that is not gated."""

_CHUNK = 1 << 20
_MODELS = r"/api/models/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Fault:
    """What goes wrong with requests.

    Attributes:
        path: found in the path of those it concerns, as a regular expression.
        method: those of this method; ``None``: of any.
        times: how many of them.
        skip: how many of them first go well.
        status: answer with this one.
        headers: more headers of the answer, which take the place of those of the same name.
        drop_after: cut the connection after so many bytes of the body; -1: before any answer.
        delay: seconds to wait before the answer.
    """

    path: str = ""
    method: str | None = None
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A request, and what it was answered with.

    Attributes:
        sent: bytes of the body of the answer.
    """

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    sent: int


class HubServer:
    """Serves repositories while its ``with`` block runs.

    Attributes:
        url: what ``HF_ENDPOINT`` shall be.
        repositories: by ``owner/name``.
        tokens: those that are known.
        requests: all so far, in the order in which they were answered.
        faults: the first that concerns a request is what happens to it.
        multipart_over: larger files are uploaded in parts.
        page: the most entries of a listing in one answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.tokens = {TOKEN}
        self.requests: list[Seen] = []
        self.faults: list[Fault] = []
        self.multipart_over = 1 << 30
        self.page = 1000
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.mistakes: list[BaseException] = []
        self.lock = Lock()
        self._servers = [_Server(self, handler) for handler in (_Hub, _Storage)]
        self.url, self.storage_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )
        self._threads = [
            Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            for server in self._servers
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
        if self.mistakes:
            raise self.mistakes[0]

    def add(self, name: str, files: Mapping[str, bytes] | Path, **options: Any) -> str:
        """Make a repository, with files; the SHA of its commit."""
        self.repositories[name] = HubRepository(name, **options)
        return self.commit(name, files)

    def commit(self, name: str, files: Mapping[str, bytes] | Path) -> str:
        """Add or replace files in a repository; the SHA of the new commit."""
        return self.repositories[name].commit(blobs_of(files))

    def forget(self) -> None:
        """Take no account of the requests so far."""
        with self.lock:
            self.requests.clear()

    @property
    def sent(self) -> int:
        """Bytes of files that were sent, as they are and not as listings."""
        with self.lock:
            return sum(
                seen.sent
                for seen in self.requests
                if seen.method == "GET" and seen.status in (200, 206) and "/api/" not in seen.path
            )

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                concerned = fault.method in (None, method) and re.search(fault.path, path)
                if not concerned or not fault.times:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """What makes the client of another process talk to a server."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "TRANSFORMERS_OFFLINE": "0",
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up whenever they like; all else is a mistake in here."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self.hub.mistakes.append(error)


class _Refused(Exception):  # noqa: N818 - an answer, rather than an error
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    headers: Message

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.hub.fault(self.command, self.path)
        if self.fault is not None:
            time.sleep(self.fault.delay)
            if self.fault.drop_after == -1:
                self._hang_up()
                self._seen(0, 0)
                return
            if self.fault.status is not None:
                self.answer(self.fault.status, b"failing", dict(self.fault.headers))
                return
        try:
            self.route()
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code is not None:
                headers["X-Error-Code"] = refused.code
            self.json({"error": refused.message}, refused.status, headers)

    def route(self) -> None:
        raise NotImplementedError

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization") or ""
        return given.removeprefix("Bearer ") or None

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json", **(headers or {})}
        self.answer(status, json.dumps(value).encode(), kind)

    def answer(self, status: int, content: bytes | Blob, headers: Mapping[str, str]) -> None:
        """Answer with bytes, or with a file or the range of it that was asked for."""
        size = len(content) if isinstance(content, bytes) else content.size
        start, stop, headers = 0, size, dict(headers)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if isinstance(content, Blob):
            headers["Accept-Ranges"] = "bytes"
            if wanted is not None:
                start = int(wanted[1])
                stop = min(size, int(wanted[2]) + 1) if wanted[2] else size
                if start >= size:
                    self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
                    return
                status = 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if self.fault is not None:
            headers.update(self.fault.headers)
        self.send_response(status)
        for name, value in {"Content-Length": str(stop - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            self._seen(status, 0)
            return
        drop = self.fault.drop_after if self.fault is not None else None
        end = stop if drop is None else min(stop, start + drop)
        # Written down before it is sent: whoever has got it finds it there.
        self._seen(status, end - start)
        self._send(content, start, end)
        if end < stop:
            self._hang_up()

    def _send(self, content: bytes | Blob, position: int, end: int) -> None:
        while position < end:
            count = min(_CHUNK, end - position)
            piece = (
                content[position : position + count]
                if isinstance(content, bytes)
                else content.read(position, count)
            )
            self.wfile.write(piece)
            position += count

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _seen(self, status: int, sent: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(
                Seen(self.command, self.path, self.headers.get("Range"), self.token, status, sent)
            )


class _Storage(_Handler):
    """What the Hub redirects to, and where large files are uploaded."""

    def route(self) -> None:
        if self.token is not None:
            raise _Refused(400, "a token reached the storage, which is another origin")
        address = urlsplit(self.path)
        oid = address.path.rsplit("/", 1)[-1]
        if self.command == "PUT":
            part = parse_qs(address.query).get("part")
            if part is None:
                self.hub.objects[oid] = self.body
            else:
                self.hub.parts[oid, int(part[0])] = self.body
            self.answer(200, b"", {"ETag": f'"{len(self.body)}"'})
            return
        if self.command == "POST":
            numbers = sorted(number for name, number in self.hub.parts if name == oid)
            self.hub.objects[oid] = b"".join(self.hub.parts[oid, number] for number in numbers)
            self.answer(200, b"", {})
            return
        for repository in self.hub.repositories.values():
            for commit in repository.commits.values():
                for blob in commit.files.values():
                    if blob.lfs and blob.sha256 == oid:
                        self.answer(200, blob, {"ETag": f'"{oid[:32]}"'})
                        return
        raise _Refused(403, "no such object, or its signature has expired")


class _Hub(_Handler):
    """The endpoints of the Hub that the client uses for models."""

    def route(self) -> None:
        if self.token is not None and self.token not in self.hub.tokens:
            raise _Refused(401, "Invalid credentials in Authorization header")
        address = urlsplit(self.path)
        self.query = {key: found[0] for key, found in parse_qs(address.query).items()}
        for method, pattern, endpoint in _ENDPOINTS:
            found = re.fullmatch(pattern, address.path)
            if found is not None and self.command in method:
                given = {key: unquote(text or "") for key, text in found.groupdict().items()}
                endpoint(self, **given)
                return
        raise _Refused(404, f"no such endpoint: {self.command} {address.path}")

    def sent(self) -> Json:
        found: Json = json.loads(self.body)
        return found

    def repository(self, name: str) -> HubRepository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token is None):
            # Whoever is not known is not told which of the two it is.
            status = 401 if self.token is None else 404
            raise _Refused(status, "Repository not found", "RepoNotFound")
        return found

    def state(self, repository: HubRepository, revision: str) -> Commit:
        found = repository.find(revision)
        if found is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def writable(self, name: str) -> HubRepository:
        if self.token is None:
            raise _Refused(401, "Invalid username or password.")
        return self.repository(name)

    def whoami(self) -> None:
        if self.token is None:
            raise _Refused(401, "Invalid username or password.")
        self.json({"type": "user", "name": "somebody", "orgs": [], "auth": {}})

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self.repository(repo)
        commit = self.state(repository, revision or "main")
        self.json(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit.sha,
                "private": repository.private,
                "gated": "manual" if repository.gated is True else repository.gated,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                "cardData": card_data(commit.files),
            }
        )

    def settings(self, repo: str) -> None:
        repository = self.writable(repo)
        given = self.sent()
        if "gated" in given:
            repository.gated = given["gated"]
            repository.granted |= {self.token} if self.token else set()
        if "visibility" in given:
            repository.private = given["visibility"] == "private"
        self.json({})

    def tree(self, repo: str, revision: str, below: str) -> None:
        repository = self.repository(repo)
        commit = self.state(repository, revision)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries = repository.tree(commit, below.strip("/"), recursive=recursive)
        if below and not entries:
            raise _Refused(404, f"{below} does not exist", "EntryNotFound")
        first = int(self.query.get("cursor", "0"))
        headers = {}
        if first + self.hub.page < len(entries):
            query = f"recursive={recursive}&cursor={first + self.hub.page}"
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.url}{path}?{query}>; rel="next"'
        self.json(entries[first : first + self.hub.page], headers=headers)

    def paths(self, repo: str, revision: str) -> None:
        commit = self.state(self.repository(repo), revision)
        wanted = parse_qs(self.body.decode())["paths"]
        self.json([commit.files[path].entry(path) for path in wanted if path in commit.files])

    def refs(self, repo: str) -> None:
        found = self.repository(repo).refs.items()
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in found
        ]
        self.json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self.repository(repo)
        commit = self.state(repository, revision)
        if repository.gated and self.token not in repository.granted:
            message = f"Access to model {repo} is restricted."
            raise _Refused(401 if self.token is None else 403, message, "GatedRepo")
        blob = commit.files.get(path)
        if blob is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            self.answer(200, blob, headers)
            return
        headers |= {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
            "Location": f"{self.hub.storage_url}/blobs/{blob.sha256}",
        }
        self.answer(302, b"", headers)

    def create(self) -> None:
        if self.token is None:
            raise _Refused(401, "Invalid username or password.")
        given = self.sent()
        name = f"{given.get('organization') or 'somebody'}/{given['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            self.json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = given.get("visibility") == "private" or bool(given.get("private"))
        self.hub.repositories[name] = HubRepository(name, private=private)
        self.json({"url": url, "name": name})

    def delete(self) -> None:
        given = self.sent()
        self.writable(f"{given.get('organization') or 'somebody'}/{given['name']}")
        del self.hub.repositories[f"{given.get('organization') or 'somebody'}/{given['name']}"]
        self.json({})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def branch(self, repo: str, name: str) -> None:
        repository = self.writable(repo)
        start = self.sent().get("startingPoint") or self.sent().get("tag") or "main"
        if name in repository.refs:
            raise _Refused(409, f"Reference already exists: {name}")
        repository.refs[name] = self.state(repository, str(start)).sha
        self.json({})

    def preupload(self, repo: str, revision: str) -> None:
        files = self.state(self.writable(repo), revision).files
        found = []
        for file in self.sent()["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            lfs = path.endswith(LFS_SUFFIXES) or (binary and file["size"] > 0)
            oid = files[path].git_oid if path in files else None
            mode = "lfs" if lfs else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": found})

    def batch(self, repo: str) -> None:
        self.writable(repo)
        objects = []
        for wanted in self.sent()["objects"]:
            oid, size, storage = wanted["oid"], wanted["size"], self.hub.storage_url
            answer: Json = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: Json = {"href": f"{storage}/blobs/{oid}", "header": {}}
                if size > self.hub.multipart_over:
                    step = self.hub.multipart_over
                    upload["header"] = {"chunk_size": str(step)} | {
                        str(part + 1): f"{storage}/blobs/{oid}?part={part + 1}"
                        for part in range(-(-size // step))
                    }
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        transfer = "multipart" if len(objects) else "basic"
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self.json({"transfer": transfer, "objects": objects}, headers=kind)

    def verify(self, repo: str) -> None:
        self.writable(repo)
        given = self.sent()
        found = self.hub.objects.get(given["oid"])
        if found is None or len(found) != given["size"]:
            raise _Refused(404, "the object was not uploaded")
        self.json({})

    def push(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        header: Json = {}
        changes: dict[str, Blob | None] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    header = value
                case "file":
                    changes[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    changes[value["path"]] = Blob(self._uploaded(value["oid"]), lfs=True)
                case "deletedFile":
                    changes[value["path"]] = None
                case "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = self.state(repository, revision).files
                    gone = [path for path in files if path.startswith(prefix)]
                    changes |= dict.fromkeys(gone)
        parent = header.get("parentCommit")
        if parent is not None and parent != repository.refs.get(revision):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        title, description = header["summary"], header.get("description", "")
        sha = repository.commit(changes, branch=revision, title=title, description=description)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.json({"success": True, "commitUrl": url, "commitOid": sha})

    def _uploaded(self, oid: str) -> bytes | Path:
        if oid in self.hub.objects:
            return self.hub.objects[oid]
        raise _Refused(400, f"the object {oid} was not uploaded")


_ENDPOINTS: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), r"/api/whoami-v2", _Hub.whoami),
    (("GET",), _MODELS, _Hub.info),
    (("PUT",), _MODELS + r"/settings", _Hub.settings),
    (("GET",), _MODELS + r"/revision/(?P<revision>[^/]+)", _Hub.info),
    (("GET",), _MODELS + r"/tree/(?P<revision>[^/]+)(?P<below>/.*)?", _Hub.tree),
    (("POST",), _MODELS + r"/paths-info/(?P<revision>[^/]+)", _Hub.paths),
    (("GET",), _MODELS + r"/refs", _Hub.refs),
    (("POST",), _MODELS + r"/(?:branch|tag)/(?P<name>[^/]+)", _Hub.branch),
    (("POST",), _MODELS + r"/preupload/(?P<revision>[^/]+)", _Hub.preupload),
    (("POST",), _MODELS + r"/commit/(?P<revision>[^/]+)", _Hub.push),
    (("POST",), r"/api/repos/create", _Hub.create),
    (("DELETE",), r"/api/repos/delete", _Hub.delete),
    (("POST",), r"/api/validate-yaml", _Hub.validate),
    (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Hub.batch),
    (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/verify", _Hub.verify),
    (
        ("GET", "HEAD"),
        r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        _Hub.resolve,
    ),
]
