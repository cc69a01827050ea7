"""Errors between here and the Hub are one line that names the cause, and leave nothing half done."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

import pytest

from .conftest import TUNED
from .user import User, UserError

pytestmark = pytest.mark.slow

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LOADERS = ("load_adapter", "ZeroShotClassifier.from_pretrained", "FewShotClassifier.from_pretrained")


def one_line(user: User, code: str, type_name: str, *said: str) -> str:
    """The snippet's error, of that type, in one line that says all of that."""
    with pytest.raises(UserError) as raised:
        user.run(code)
    error = raised.value
    assert error.type_name == type_name, error.traceback_text
    assert len(error.message.splitlines()) == 1, error.message
    for words in said:
        assert words in error.message
    return error.message


@pytest.fixture
def adapter(hub, pushed) -> dict[str, bytes]:
    """The files of a good one."""
    files = hub.files(pushed["prompts", False][0])
    return {name: content for name, content in files.items() if name != ".gitattributes"}


@pytest.fixture
def impatient(author, reader):
    """Neither waits between attempts."""
    for user in (author, reader):
        user.run("from unittest import mock; patience = mock.patch('time.sleep'); patience.start()")
    yield
    for user in (author, reader):
        user.run("patience.stop()")


# Loading


@pytest.mark.parametrize("loader", [*LOADERS, "hypothesis_template"])
def test_missing_repository(hub, author, reader, loader):
    one_line(author, f"{loader}('user/missing')", "OSError", "user/missing", "there is no such repository")
    one_line(reader, f"{loader}('user/missing')", "OSError", "user/missing", "no valid token", "misspelt")


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_missing_revision(pushed, reader, revision):
    repo_id = pushed["prompts", False][0]
    code = f"load_adapter({repo_id!r}, revision={revision!r})"
    one_line(reader, code, "OSError", f"{repo_id} at revision {revision}", "there is no such revision")


def test_wrong_token(hub, reader, adapter):
    hub.add("other/guarded", adapter)
    code = "load_adapter('other/guarded', token='hf_wrong')"
    message = one_line(reader, code, "OSError", "other/guarded", "no valid token")
    assert "hf_wrong" not in message


@pytest.mark.parametrize("name", ["./not/there", "a/b/c", "user/with space"])
def test_what_is_no_repository_id(hub, reader, name):
    one_line(reader, f"load_adapter({name!r})", "OSError", name, "neither a folder nor the id of a repository")
    assert hub.requests == []


def test_a_repository_without_adapter(hub, author, reader):
    """Its weights are not even downloaded."""
    hub.add("other/whole-model", hub.files("user/tiny-clip"))
    one_line(reader, "load_adapter('other/whole-model')", "ValueError", "other/whole-model has no adapter_config.json")
    assert hub.requests
    assert not any(path.endswith(".safetensors") for _, path in hub.requests)


@pytest.mark.parametrize("loader", LOADERS)
def test_pickles_are_never_loaded(hub, reader, adapter, tmp_path, loader):
    flag = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (flag,)

    weights = pickle.dumps(Bomb())
    pickle.loads(weights)
    assert flag.exists()  # the bomb works
    flag.unlink()
    hub.add("other/pickled", {CONFIG: adapter[CONFIG], "adapter_model.bin": weights})
    hub.requests.clear()
    message = one_line(reader, f"{loader}('other/pickled')", "ValueError", f"other/pickled has no {WEIGHTS}")
    assert "pickles are not read" in message
    assert not flag.exists()
    assert not any(path.endswith(".bin") for _, path in hub.requests)


def test_safetensors_are_taken_where_both_are_there(hub, reader, adapter, pushed):
    hub.add("other/both", {**adapter, "adapter_model.bin": b"no pickle at all"})
    hub.requests.clear()
    assert reader.run("result = tuned.answers(load_adapter('other/both'))") == pushed["prompts", False][1]
    assert not any(path.endswith(".bin") for _, path in hub.requests)


def changed(content: bytes, **entries) -> bytes:
    return json.dumps({**json.loads(content), **entries}).encode()


@pytest.mark.parametrize("loader", ["load_adapter", "hypothesis_template"])
@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("cut", lambda config: config[:50], "adapter_config.json in other/config-cut is damaged"),
        ("empty", lambda config: b"", "adapter_config.json in other/config-empty is damaged"),
        ("bytes", lambda config: b"\xff\xfe\0" + config, "adapter_config.json in other/config-bytes is damaged"),
        ("list", lambda config: b"[1]", "adapter_config.json in other/config-list is damaged"),
        ("unknown", lambda config: changed(config, peft_type="FOO"), "of the type 'FOO', which PEFT does not know"),
        ("refused", lambda config: changed(config, num_text_tokens=-3), "num_text_tokens=-3 must be"),
    ],
)
def test_damaged_config(hub, reader, adapter, loader, name, damage, said):
    repo_id = f"other/config-{name}"
    hub.add(repo_id, {**adapter, CONFIG: damage(adapter[CONFIG])})
    one_line(reader, f"{loader}({repo_id!r})", "ValueError", said)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("cut", lambda weights: weights[:-30]), ("empty", lambda weights: b""), ("noise", lambda weights: b"\xff" * 999)],
)
def test_damaged_weights(hub, reader, adapter, name, damage):
    repo_id = f"other/weights-{name}"
    hub.add(repo_id, {**adapter, WEIGHTS: damage(adapter[WEIGHTS])})
    one_line(reader, f"load_adapter({repo_id!r})", "ValueError", f"adapter file in {repo_id} is damaged or truncated")


def test_what_was_corrupted_on_the_way_is_noticed(hub, reader, adapter):
    """The client compares sizes alone."""
    hub.add("other/corrupt", adapter)
    hub.corrupt = {WEIGHTS}
    one_line(reader, "load_adapter('other/corrupt')", "ValueError", "other/corrupt is damaged or truncated")


def test_a_base_model_at_fault_is_named(hub, reader, adapter):
    clip = hub.files("user/tiny-clip")
    hub.add("other/bad-base", {**clip, "model.safetensors": clip["model.safetensors"][:5000]})
    for base, reason in (("other/bad-base", "damaged or truncated"), ("other/missing", "is not a valid model id")):
        hub.add("other/on-it", {**adapter, CONFIG: changed(adapter[CONFIG], base_model_name_or_path=base)})
        said = (f"The base model {base} cannot be loaded; pass base_model.", reason)
        one_line(reader, "load_adapter('other/on-it')", "OSError", *said)
    hub.add("other/on-nothing", {**adapter, CONFIG: changed(adapter[CONFIG], base_model_name_or_path=None)})
    one_line(reader, "load_adapter('other/on-nothing')", "ValueError", "names no base model; pass base_model")


def test_class_names_and_shapes_that_do_not_fit(hub, pushed, reader):
    head = hub.files(pushed["head", False][0])
    for name, content, said in (
        ("cut", b'["a",', "class_names.json beside the adapter is damaged"),
        ("few", b'["a", "b"]', "class_names.json beside the adapter other/names-few has 2 names"),
    ):
        hub.add(f"other/names-{name}", {**head, "class_names.json": content})
        one_line(reader, f"load_adapter('other/names-{name}')", "ValueError", said)
    headless = {CONFIG: head[CONFIG], WEIGHTS: hub.files(pushed["prompts", False][0])[WEIGHTS]}
    hub.add("other/headless", {**headless, "class_names.json": head["class_names.json"]})
    one_line(
        reader, "load_adapter('other/headless')", "ValueError", "Neither the adapter nor user/tiny-vit holds the head"
    )


def test_prototypes_missing_or_damaged(hub, pushed, reader):
    name, files = "prototypes.safetensors", hub.files(pushed["copa", False][0])
    hub.add("other/unprototyped", {path: content for path, content in files.items() if path != name})
    hub.add("other/cut-prototypes", {**files, name: files[name][:-8]})
    for repo_id, said in (("other/unprototyped", f"has no {name}"), ("other/cut-prototypes", "is damaged")):
        one_line(reader, f"FewShotClassifier.from_pretrained({repo_id!r})", "ValueError", repo_id, name, said)
    other = pushed["prompts", False][0]
    one_line(reader, f"FewShotClassifier.from_pretrained({other!r})", "ValueError", f"{other} holds a NCGEO_NPT")


@pytest.mark.parametrize("lfs", [False, True])
def test_a_truncated_download_leaves_nothing(hub, reader, adapter, pushed, impatient, lfs):
    hub.lfs = lfs
    repo_id = f"other/truncated-{lfs}"
    hub.add(repo_id, adapter)
    hub.truncate = {WEIGHTS: 1000}
    one_line(reader, f"load_adapter({repo_id!r})", "OSError", repo_id, "the Hub cannot be reached", "1000 bytes")
    folder = reader.home / "hub" / f"models--{repo_id.replace('/', '--')}"
    assert not list(folder.glob(f"snapshots/*/{WEIGHTS}"))
    hub.truncate = {}
    assert reader.run(f"result = tuned.answers(load_adapter({repo_id!r}))") == pushed["prompts", False][1]


def test_without_network(pushed, reader):
    """Cached files load without the Hub, missing ones are named: offline by choice, and with the Hub down."""
    repo_id, said = pushed["trained", False]
    reader.run(f"ZeroShotClassifier.from_pretrained({repo_id!r})")
    with socket.socket() as closed:  # bound and not listening: whoever connects is refused
        closed.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": down}):
            warm, cold, push = reader.fresh(
                f"""
{TUNED}
from unittest import mock
mock.patch("time.sleep").start()  # before the client's next attempt
def error(call, *args):
    try:
        call(*args)
    except Exception as error:
        return [type(error).__name__, str(error)]

classifier = ZeroShotClassifier.from_pretrained({repo_id!r})
warm = classifier.predict_proba(tuned.IMAGES, tuned.NEW).tolist()
result = [warm, error(load_adapter, "user/cold"), error(push_adapter, classifier.model, "user/cold")]
""",
                **environment,
            )
            assert warm == said["probabilities"]
            for name, message in (cold, push):
                assert name == "OSError"
                assert len(message.splitlines()) == 1
                assert "cannot be reached" in message
            assert "The adapter user/cold cannot be loaded: it is not in the cache" in cold[1]


# Pushing


@pytest.fixture
def model(author) -> None:
    """`model` in the author's process, and `before`, what lies around in it."""
    (author.work / "tmp").mkdir(exist_ok=True)
    author.run("""
    import os, tempfile
    tempfile.tempdir = os.path.abspath("tmp")
    model = tuned.far(tuned.get_peft_model(tuned.base(tuned.CLIP), tuned.NPTConfig(num_text_tokens=2)))
    """)
    yield
    author.run("tempfile.tempdir = None")


def lying_around(user: User) -> set[str]:
    return {str(path.relative_to(user.work)) for path in user.work.rglob("*")}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("push_adapter(model, 'user/wrong', token='hf_wrong')", "no valid token"),
        ("push_adapter(model, 'wrong', token='hf_wrong')", "no valid token"),
        ("push_adapter(model, 'other/model')", "other/model was not pushed: the token has no permission to write"),
        ("push_adapter(model, 'user/by-request', create_pr=True)", "user/by-request was not pushed"),
    ],
)
def test_refused_pushes(hub, author, model, call, said):
    before, commits = lying_around(author), len(hub.commits("user/tiny-clip"))
    message = one_line(author, call, "OSError", said)
    assert "hf_wrong" not in message
    assert lying_around(author) == before
    assert not {"user/wrong", "other/model"} & hub.repos.keys()
    assert len(hub.commits("user/tiny-clip")) == commits


def test_without_a_token(hub, reader):
    reader.run("model = tuned.get_peft_model(tuned.base(tuned.CLIP), tuned.NPTConfig(num_text_tokens=2))")
    for name in ("user/anonymous", "anonymous"):
        one_line(reader, f"push_adapter(model, {name!r})", "OSError", name, "no valid token; log in with `hf auth")
    assert "user/anonymous" not in hub.repos


def test_refused_write(hub, author, model):
    hub.refuse_writes = True
    before = lying_around(author)
    said = "user/refused-write was not pushed: the token has no permission to write"
    one_line(author, "push_adapter(model, 'user/refused-write')", "OSError", said)
    assert lying_around(author) == before
    assert len(hub.commits("user/refused-write")) == 1


@pytest.mark.parametrize("call", ["push_adapter(model.get_base_model(), 'user/x')", "push_adapter(5, 'user/x')"])
def test_only_adapters_are_pushed(hub, author, model, call):
    one_line(author, call, "TypeError", "Expected a PeftModel")
    assert "user/x" not in hub.repos


@pytest.mark.parametrize("name", ["a/b/c", "with space/x", "", "user/--"])
def test_names_that_the_hub_does_not_take(hub, author, model, name):
    hub.requests.clear()
    one_line(author, f"push_adapter(model, {name!r})", "ValueError", name)
    assert hub.requests == []


@pytest.mark.parametrize("lfs", [False, True])
def test_an_interrupted_upload_leaves_nothing(hub, author, model, impatient, lfs):
    repo_id = f"user/broken-off-{lfs}"
    hub.lfs, hub.drop_upload_after = lfs, 100
    before = lying_around(author)
    one_line(author, f"push_adapter(model, {repo_id!r})", "OSError", f"{repo_id} was not pushed: ")
    assert [commit.title for commit in hub.commits(repo_id)] == ["initial commit"]
    assert lying_around(author) == before
    assert os.listdir(author.work / "tmp") == []
    hub.drop_upload_after = None
    author.run(f"push_adapter(model, {repo_id!r})")
    assert {CONFIG, WEIGHTS, "README.md"} <= hub.files(repo_id).keys()
    assert lying_around(author) == before


@pytest.mark.parametrize("fault", ["refuse_writes", "drop_upload_after"])
def test_a_failed_push_leaves_the_last_one(hub, author, reader, model, fault):
    expected = author.run(f"push_adapter(model, 'user/kept-{fault}'); result = tuned.answers(model)")
    files = hub.files(f"user/kept-{fault}")
    setattr(hub, fault, 100 if fault == "drop_upload_after" else True)
    one_line(author, f"push_adapter(tuned.far(model), 'user/kept-{fault}')", "OSError", "was not pushed")
    setattr(hub, fault, None if fault == "drop_upload_after" else False)
    assert hub.files(f"user/kept-{fault}") == files
    assert reader.run(f"result = tuned.answers(load_adapter('user/kept-{fault}'))") == expected
