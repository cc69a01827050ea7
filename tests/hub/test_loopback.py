"""The loopback Hub answers `huggingface_hub` as the Hub does, and fails when it is told to."""

from __future__ import annotations

import json
import os
from urllib.request import Request, urlopen

import pytest

from .user import User, UserError

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def api(user):
    """The user has `huggingface_hub` and `push`, which uploads {path: text or size of a random file}."""
    user.run("""
    import os, shutil
    from pathlib import Path
    from unittest import mock
    import huggingface_hub as hf

    def push(repo_id, **files):
        shutil.rmtree("folder", ignore_errors=True)
        for path, content in files.items():
            file = Path("folder", path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.urandom(content) if isinstance(content, int) else content.encode())
        hf.create_repo(repo_id, exist_ok=True)
        return hf.upload_folder(repo_id=repo_id, folder_path="folder").oid

    def contents(folder):
        return {str(file.relative_to(folder)): file.read_bytes().hex() for file in Path(folder).rglob("*.*")}
    """)
    return user


def push(user, repo_id: str, **files) -> str:
    return user.run(f"result = push({repo_id!r}, **{files!r})")


# The user


def test_names_stay_and_prints_are_kept_apart(user):
    user.run("import sys; x = [1]; print('out'); print('err', file=sys.stderr); os_write = __import__('os').write")
    assert user.out.split() == ["out", "err"]
    assert user.run("os_write(1, b'by the descriptor'); x.append(2); result = {'x': x}") == {"x": [1, 2]}
    assert user.out == "by the descriptor"
    assert user.run("x.append(3)") is None  # no `result` of its own
    with pytest.raises(UserError, match="NameError: name 'x' is not defined"):
        user.fresh("x")


def test_errors_tell_where(user):
    with pytest.raises(UserError) as raised:
        user.run("""
        def divide():
            return 1 / 0
        divide()
        """)
    assert (raised.value.type_name, raised.value.message) == ("ZeroDivisionError", "division by zero")
    assert "return 1 / 0" in raised.value.traceback_text
    with pytest.raises(UserError, match="TypeError.*Object.*not JSON"):
        user.run("result = {1}")


def test_a_snippet_that_hangs_or_dies_is_named(loopback):
    with User(loopback.url, timeout=0.5) as user:
        with pytest.raises(UserError, match=r"TimeoutError.*0.5"):
            user.run("import time; time.sleep(60)")
        user.timeout = 60
        with pytest.raises(UserError, match="ProcessError: the process ended"):
            user.run("import os; os._exit(3)")
        assert user.run("result = 1 + 1") == 2


def test_a_user_has_nothing_of_ours(user, monkeypatch, loopback):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with User(loopback.url) as other:
        names = set(other.environment)
        assert not names & {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTPS_PROXY"}
        assert other.run("import os; result = os.getcwd()") == os.path.realpath(other.work)
        assert other.fresh("import os; result = os.environ.get('HF_HUB_OFFLINE')", HF_HUB_OFFLINE="1") == "1"


# The Hub


@pytest.mark.parametrize("lfs", [False, True])
def test_what_is_pushed_comes_back(hub, api, lfs):
    hub.lfs = lfs
    name = f"user/round-trip-{lfs}"
    sha = push(api, name, **{WEIGHTS: 200_000, "README.md": "---\nlibrary_name: peft\n---\n", "deep/er/a.json": "{}"})
    files = hub.files(name)
    assert set(files) == {".gitattributes", WEIGHTS, "README.md", "deep/er/a.json"}
    assert len(files[WEIGHTS]) == 200_000
    assert [commit.sha for commit in hub.commits(name)][1:] == [sha]
    assert lfs == any(method == "PUT" for method, _ in hub.requests)
    sent = api.run("result = contents('folder')")
    came = api.run(f"result = contents(hf.snapshot_download({name!r}))")
    assert sent == {path: content for path, content in came.items() if path != ".gitattributes"}
    assert came == {path: content.hex() for path, content in files.items()}
    again = api.run(f"result = hf.upload_folder(repo_id={name!r}, folder_path='folder').oid")
    assert again == sha
    assert len(hub.commits(name)) == 2


def test_small_files_need_no_xet(hub, api):
    """With hf_xet, as most have it, `upload_folder` takes another way; it works as long as no file is large."""
    code = """
    import huggingface_hub as hf
    open("a.json", "w").write("{}")
    hf.create_repo("user/small")
    hf.upload_folder(repo_id="user/small", folder_path=".", allow_patterns="a.json")
    """
    api.fresh(code, HF_HUB_DISABLE_XET=None)
    assert hub.files("user/small")["a.json"] == b"{}"


def test_revisions(hub, api):
    old = push(api, "user/revisions", **{"a.json": "old"})
    api.run("hf.create_branch('user/revisions', branch='kept/old')")
    push(api, "user/revisions", **{"a.json": "new"})
    read = "result = Path(hf.hf_hub_download('user/revisions', 'a.json', revision={!r})).read_text()"
    assert [api.run(read.format(revision)) for revision in (old, "kept/old", "main", None)] == [
        "old",
        "old",
        "new",
        "new",
    ]
    api.run("hf.delete_file('a.json', 'user/revisions', revision='kept/old')")
    assert "a.json" not in hub.files("user/revisions", "kept/old")
    assert hub.files("user/revisions", old)["a.json"] == b"old"


def test_what_loaders_ask(hub, api):
    hub.lfs = True
    card = "---\nlibrary_name: peft\npipeline_tag: zero-shot-image-classification\n---\n"
    sha = hub.add("other/model", {"README.md": card.encode(), WEIGHTS: b"weights", "chat/a.jinja": b""}).sha
    answers = api.run("""
    info = hf.model_info("other/model")
    listed = hf.HfApi().list_repo_tree
    paths = hf.get_paths_info("other/model", ["chat", "adapter_model.safetensors", "missing"])
    result = [
        hf.whoami()["name"],
        [info.sha, info.library_name, info.pipeline_tag, info.private],
        hf.resolve_revision("other/model").resolved,
        hf.list_repo_files("other/model"),
        [entry.path for entry in listed("other/model", "chat", revision=info.sha)],
        [entry.path for entry in listed("other/model")],
        [(entry.path, getattr(entry, "size", None)) for entry in paths],
        [hf.file_exists("other/model", name) for name in ("README.md", "missing")],
        [hf.repo_exists(name) for name in ("other/model", "other/missing", "missing")],
    ]
    """)
    assert answers == [
        "user",
        [sha, "peft", "zero-shot-image-classification", False],
        sha,
        [".gitattributes", "README.md", WEIGHTS, "chat/a.jinja"],
        ["chat/a.jinja"],
        [".gitattributes", "README.md", WEIGHTS, "chat"],
        [[WEIGHTS, 7], ["chat", None]],
        [True, False],
        [True, False, False],
    ]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("hf.model_info('user/missing')", "RepositoryNotFoundError: 404"),
        ("hf.model_info('user/missing', token=False)", "RepositoryNotFoundError: 401"),
        ("hf.snapshot_download('missing')", "RepositoryNotFoundError: 404"),
        ("hf.hf_hub_download('user/errors', 'missing')", "RemoteEntryNotFoundError: 404"),
        ("list(hf.HfApi().list_repo_tree('user/errors', 'missing'))", "RemoteEntryNotFoundError: 404"),
        ("hf.hf_hub_download('user/errors', 'a', revision='missing')", "RevisionNotFoundError: 404"),
        ("hf.snapshot_download('user/errors', revision='0' * 40)", "RevisionNotFoundError: 404"),
        ("hf.model_info('user/errors', token='hf_wrong')", "HfHubHTTPError: .*401.*\n.*\n.*Invalid credentials"),
        ("hf.whoami(token='hf_wrong')", "HfHubHTTPError: Invalid user token"),
        ("hf.create_repo('user/new', token=False)", "HfHubHTTPError: .*401"),
        ("hf.create_repo('user/errors')", "HfHubHTTPError: .*409"),
        ("hf.create_repo('other/new')", "HfHubHTTPError: .*403 Forbidden: You don't have the rights"),
        ("hf.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='user/errors', token=False)", ".*401"),
        ("hf.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='other/errors')", ".*403 Forbidden"),
        ("hf.hf_hub_download('other/private', 'a')", "RepositoryNotFoundError: 404"),
    ],
)
def test_refusals(hub, api, call, error):
    for name in ("user/errors", "other/errors", "other/private"):
        hub.add(name, {"a": b"a"}, private=name == "other/private")
    commits = [len(hub.commits(name)) for name in hub.repos]
    with pytest.raises(UserError, match=f"(?s){error}"):
        api.run(call)
    assert [len(hub.commits(name)) for name in hub.repos] == commits


def test_private_repositories_are_their_owners(hub, api):
    api.run("hf.create_repo('user/private', private=True)")
    assert api.run("result = hf.model_info('user/private').private")
    with pytest.raises(UserError, match="RepositoryNotFoundError: 401"):
        api.fresh("import huggingface_hub; huggingface_hub.model_info('user/private')", HF_TOKEN=None)


# Faults


def test_refused_write(hub, api):
    hub.refuse_writes = True
    with pytest.raises(UserError, match="(?s)HfHubHTTPError.*403 Forbidden"):
        push(api, "user/refused", a="a")
    assert len(hub.commits("user/refused")) == 1
    hub.refuse_writes = False
    push(api, "user/refused", a="a")
    assert hub.files("user/refused")["a"] == b"a"


@pytest.mark.parametrize("lfs", [False, True])
def test_interrupted_upload_leaves_no_commit(hub, api, lfs):
    hub.lfs, hub.drop_upload_after = lfs, 100_000
    name = f"user/interrupted-{lfs}"
    error = "RuntimeError: Error while uploading" if lfs else "(ProtocolError|ReadError|WriteError): "
    with pytest.raises(UserError, match=error):
        api.run(f"with mock.patch('time.sleep'): push({name!r}, **{{{WEIGHTS!r}: 200_000}})")
    assert [commit.title for commit in hub.commits(name)] == ["initial commit"]
    hub.drop_upload_after = None
    push(api, name, **{WEIGHTS: 200_000})
    assert len(hub.files(name)[WEIGHTS]) == 200_000


def test_truncated_download_leaves_no_file(hub, api):
    hub.add("user/truncated", {WEIGHTS: os.urandom(200_000)})
    hub.truncate = {WEIGHTS: 100_000}
    download = f"result = contents(Path(hf.hf_hub_download('user/truncated', {WEIGHTS!r})).parent)"
    with pytest.raises(UserError, match="RemoteProtocolError: .*received 100000 bytes, expected 200000"):
        api.run(f"with mock.patch('time.sleep'): {download}")
    assert not [path for path in api.home.glob("hub/models--user--truncated/*/**/*") if WEIGHTS in path.name]
    assert not list(api.home.glob("hub/models--user--truncated/blobs/*"))
    hub.truncate = {}
    assert api.run(download) == {WEIGHTS: hub.files("user/truncated")[WEIGHTS].hex()}


def test_corrupt_download_is_not_noticed_by_the_client(hub, api):
    """`huggingface_hub` compares sizes alone: who loads the file has to notice."""
    hub.add("user/corrupt", {"a.json": json.dumps(list(range(100))).encode()})
    hub.corrupt = {"a.json"}
    came = api.run("result = Path(hf.hf_hub_download('user/corrupt', 'a.json')).read_bytes().hex()")
    sent = hub.files("user/corrupt")["a.json"].hex()
    assert len(came) == len(sent)
    assert came != sent


def test_ranges(hub):
    content = os.urandom(1000)
    hub.add("other/ranges", {"a": content})
    for header, part in {
        "bytes=100-": content[100:],
        "bytes=0-9": content[:10],
        "bytes=990-5000": content[990:],
    }.items():
        with urlopen(Request(f"{hub.url}/other/ranges/resolve/main/a", headers={"Range": header})) as answer:
            assert (answer.status, answer.read()) == (206, part)
            assert answer.headers["Content-Range"].endswith("/1000")
    assert hub.requests == [("GET", "/other/ranges/resolve/main/a")] * 3
