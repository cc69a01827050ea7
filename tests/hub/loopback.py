"""A Hugging Face Hub over real HTTP on 127.0.0.1, its repositories in memory.

Enough for `huggingface_hub`, Transformers and PEFT to create model repositories, push to them and load from them:
files come inside the commit, or large ones by LFS (`hub.lfs = True`; its basic transfer, so the client needs
`HF_HUB_DISABLE_XET=1`). Faults can be switched on while it runs: see `LoopbackHub.reset`.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png")
ATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE).encode()
COUNT = itertools.count()  # no two commits share a name, whatever is in them


@dataclass
class Blob:
    """A file's content, and whether it is kept by LFS rather than in git."""

    content: bytes = field(repr=False)
    lfs: bool = False

    @property
    def etag(self) -> str:
        return sha256(self.content).hexdigest() if self.lfs else self.oid

    @property
    def oid(self) -> str:
        """Git's name of the file: of its content, or of the pointer that stands for it."""
        content = f"oid sha256:{self.etag}".encode() if self.lfs else self.content
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict:
        """The file as listings show it."""
        size = len(self.content)
        lfs = {"lfs": {"oid": self.etag, "size": size, "pointerSize": 128}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": size, **lfs}


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]
    parent: Commit | None = field(repr=False)

    def listing(self) -> list[dict]:
        """All files and the folders they are in."""
        names = {"/".join(path.split("/")[:depth]) for path in self.files for depth in range(1, path.count("/") + 1)}
        folders = [{"type": "directory", "path": name, "oid": sha1(name.encode()).hexdigest()} for name in names]
        files = [blob.entry(path) for path, blob in self.files.items()]
        return sorted(folders + files, key=lambda entry: entry["path"])


class Repo:
    def __init__(self, private: bool = False):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, Commit] = {}
        self.uploads: dict[str, bytes | None] = {}  # by LFS; None is announced and not yet here
        self.commit("main", "initial commit", {".gitattributes": Blob(ATTRIBUTES)})

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        sha = sha1(f"{title} {next(COUNT)}".encode()).hexdigest()
        commit = Commit(sha, title, files, self.branches.get(branch))
        self.commits[sha] = self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> Commit:
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def changed(self, files: dict[str, Blob], operations: list[tuple[str, dict]]) -> dict[str, Blob]:
        """The files after a commit's operations."""
        for kind, value in operations:
            path = value.get("path", "").rstrip("/")
            if kind == "file":
                files = {**files, path: Blob(base64.b64decode(value["content"]))}
            elif kind == "lfsFile":
                if self.uploads.get(value["oid"]) is None:
                    raise HubError(400, "An LFS pointer pointed to a file that does not exist")
                files = {**files, path: Blob(self.uploads[value["oid"]], lfs=True)}
            elif kind in ("deletedFile", "deletedFolder"):
                rest = {name: blob for name, blob in files.items() if not f"{name}/".startswith(f"{path}/")}
                if len(rest) == len(files):
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = rest
        return files


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # the connection ends after so many bytes of the body


class HubError(Exception):
    """An error the Hub answers with; `huggingface_hub` chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] = {}, **more):
        body = json.dumps({"error": message, **more}).encode()
        self.reply = Reply(body, status, {"X-Error-Message": message, "X-Error-Code": code, **headers})


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = r"/(?P<repo_id>(?:spaces/)?[\w.-]+(?:/[\w.-]+)?)"  # "spaces/user/name" is a Space, "user/name" a model
MODEL, REVISION = f"/api(?:/models|(?=/spaces/)){REPO}", "/(?P<revision>[^/]+)"


def route(methods: str, pattern: str) -> Callable:
    """Register a method of the Hub; the groups of the pattern are its arguments."""
    return lambda function: ROUTES.append((methods, re.compile(pattern), function)) or function


class Request(BaseHTTPRequestHandler):
    hub: LoopbackHub
    body: bytes
    query: dict[str, list[str]]

    @property
    def data(self) -> dict:
        return json.loads(self.body)

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        size, drop = int(self.headers.get("Content-Length", 0)), self.hub.drop_upload_after
        if drop is not None and drop < size and re.search("/commit/|/lfs/content/", url.path):
            self.rfile.read(drop)
            return
        self.body = self.rfile.read(size)
        if len(self.body) < size:  # the client hung up
            return
        with self.hub.lock:
            reply = self.reply(url.path)
        with suppress(ConnectionError):
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": len(reply.body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: reply.cut])

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def reply(self, path: str) -> Reply:
        try:
            for methods, pattern, function in ROUTES:
                match = pattern.fullmatch(path)
                if match and self.command in methods.split():
                    groups = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    answer = function(self.hub, self, **groups)
                    return answer if isinstance(answer, Reply) else Reply(json.dumps(answer).encode())
            raise HubError(404, f"This Hub knows no {self.command} {path}")
        except HubError as error:
            return error.reply

    def log_message(self, *args) -> None:
        """Tests read `LoopbackHub.requests` instead."""


class LoopbackHub:
    """A Hub with one account, "user", whose write token is `token`."""

    token = "hf_loopback"

    def __init__(self, lfs: bool = False):
        self.repos: dict[str, Repo] = {}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubRequest", (Request,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.reset(lfs)

    def reset(self, lfs: bool = False) -> None:
        """Forget the requests and all faults; the repositories stay."""
        self.lfs = lfs  # files that end as in `LARGE` come by LFS
        self.requests: list[tuple[str, str]] = []  # method and path
        self.refuse_writes = False  # 403 at every commit
        self.drop_upload_after: int | None = None  # hang up in a commit or LFS upload after so many bytes
        self.truncate: dict[str, int] = {}  # path -> its downloads end at this byte, though they promise all
        self.corrupt: set[str] = set()  # paths whose content is damaged on the way; the length is right

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Oldest first; the first is made with the repository and holds `.gitattributes`."""
        commits = [self.repos[repo_id].at(revision)]
        while commits[0].parent is not None:
            commits.insert(0, commits[0].parent)
        return commits

    def add(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> Commit:
        """Put files into a repository, also another user's, past all checks."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        blobs = {path: Blob(content, self.lfs and path.endswith(LARGE)) for path, content in files.items()}
        return repo.commit("main", "Add files", {**repo.at("main").files, **blobs})

    # Who may do what

    def account(self, request: Request, needed: bool = False) -> str | None:
        token = request.headers.get("Authorization")
        if token not in (None, f"Bearer {self.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        if token is None and needed:
            raise HubError(401, "Invalid username or password.")
        return token and "user"

    def readable(self, request: Request, repo_id: str) -> Repo:
        """The repository; one that is private and another's is as good as missing."""
        account, repo = self.account(request), self.repos.get(repo_id)
        if repo is None or (repo.private and account != repo_id.split("/")[0]):
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        account, repo = self.account(request, needed=True), self.readable(request, repo_id)
        if owner_of(repo_id) != account:
            raise HubError(403, "Authorization error.")
        if "create_pr" in request.query:
            raise HubError(400, "This Hub has no pull requests")
        return repo

    # Account and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> dict:
        token = {"displayName": "loopback", "role": "write"}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.account(request, needed=True), "orgs": [], "auth": auth}

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> dict:
        account = self.account(request, needed=True)
        owner = request.data.get("organization") or account
        if owner != account:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        space = request.data.get("type") == "space"
        if space and request.data.get("sdk") != "gradio":
            raise HubError(400, "A Space needs an sdk")
        repo_id = f"{'spaces/' * space}{owner}/{request.data['name']}"
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        self.repos[repo_id] = Repo(private=request.data.get("visibility") == "private")
        return {"url": f"{self.url}/{repo_id}", "name": repo_id}

    @route("POST", f"{MODEL}/branch/(?P<branch>[^/]+)")
    def create_branch(self, request: Request, repo_id: str, branch: str) -> dict:
        repo = self.writable(request, repo_id)
        if branch in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[branch] = repo.at(request.data.get("startingPoint", "main"))
        return {}

    # Reading

    @route("GET", f"{MODEL}(?:/revision{REVISION})?")
    def info(self, request: Request, repo_id: str, revision: str = "main") -> dict:
        """A model's page; the card tells its library, its task and its licence."""
        repo = self.readable(request, repo_id)
        commit = repo.at(revision)
        card = commit.files["README.md"].content.decode() if "README.md" in commit.files else ""
        told = dict(re.findall(r"^(library_name|pipeline_tag): *(\S+)$", card, flags=re.MULTILINE))
        told["cardData"] = dict(re.findall(r"^(license): *(\S+)$", card, flags=re.MULTILINE))
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": repo_id, "sha": commit.sha, "private": repo.private, "siblings": siblings, **told}

    @route("GET", f"{MODEL}/tree{REVISION}(?:/(?P<folder>.+))?")
    def tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> list[dict]:
        start = f"{folder}/" if folder else ""
        entries = self.readable(request, repo_id).at(revision).listing()
        entries = [entry for entry in entries if entry["path"].startswith(start)]
        if folder and not entries:
            raise HubError(404, "Folder not found", "EntryNotFound")
        recursive = request.query.get("recursive") == ["true"]
        return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(start)]

    @route("POST", f"{MODEL}/paths-info{REVISION}")
    def paths_info(self, request: Request, repo_id: str, revision: str) -> list[dict]:
        asked = parse_qs(request.body.decode()).get("paths", [])
        return [entry for entry in self.readable(request, repo_id).at(revision).listing() if entry["path"] in asked]

    @route("GET HEAD", f"{REPO}/resolve{REVISION}/(?P<path>.+)")
    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self.readable(request, repo_id).at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.files[path]
        content = damaged(blob.content) if path in self.corrupt else blob.content
        start, size, status = 0, len(content), 200
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": headers["ETag"]}
        stop = size
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start, stop, status = int(wanted[1]), min(int(wanted[2] or size) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            if start >= size:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        cut = max(self.truncate[path] - start, 0) if path in self.truncate else None
        return Reply(content[start:stop], status, headers, cut)

    # Writing

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request: Request) -> dict:
        told = request.data["content"].startswith("---")
        return {"errors": [], "warnings": [] if told else [{"message": "empty or missing yaml metadata in repo card"}]}

    @route("POST", f"{MODEL}/preupload{REVISION}")
    def preupload(self, request: Request, repo_id: str, revision: str) -> dict:
        """Answer how to send each file, and which object is known under its name."""
        known, files = self.writable(request, repo_id).at(revision).files, []
        for path in (file["path"] for file in request.data["files"]):
            mode = "lfs" if self.lfs and path.endswith(LARGE) else "regular"
            oid = known[path].etag if path in known else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", rf"{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo_id: str) -> dict:
        """Answer with the upload address of each object; an object that is already here gets none."""
        repo, objects, url = self.writable(request, repo_id), request.data["objects"], f"{self.url}/{repo_id}/lfs"
        for wanted in objects:
            if repo.uploads.setdefault(wanted["oid"]) is None:
                upload = {"href": f"{url}/content/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", f"{REPO}/lfs/content/(?P<oid>[0-9a-f]+)")
    def lfs_upload(self, request: Request, repo_id: str, oid: str) -> dict:
        """Without a token, as on the Hub: the address is the permission."""
        if oid not in self.repos[repo_id].uploads or sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"This is not the content announced as {oid}")
        self.repos[repo_id].uploads[oid] = request.body
        return {}

    @route("POST", f"{REPO}/lfs/verify")
    def lfs_verify(self, request: Request, repo_id: str) -> dict:
        content = self.writable(request, repo_id).uploads.get(request.data["oid"])
        if content is None or len(content) != request.data["size"]:
            raise HubError(404, "The object was not uploaded")
        return {}

    @route("POST", f"{MODEL}/commit{REVISION}")
    def commit(self, request: Request, repo_id: str, revision: str) -> dict:
        """All operations or none."""
        repo = self.writable(request, repo_id)
        if self.refuse_writes:
            raise HubError(403, "Authorization error.")
        head = repo.at(revision)
        if revision not in repo.branches:
            raise HubError(400, f"{revision} is not a branch")
        operations = [(line["key"], line["value"]) for line in map(json.loads, request.body.splitlines())]
        header = dict(operations)["header"]
        sha = repo.commit(revision, header["summary"], repo.changed(head.files, operations)).sha
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}


def owner_of(repo_id: str) -> str:
    return repo_id.removeprefix("spaces/").split("/")[0]


def damaged(content: bytes) -> bytes:
    """Wrong bytes where formats tell what they are, so that every reader can notice."""
    return bytes(byte ^ 0xFF for byte in content[:64]) + content[64:]
