"""Nothing of the author's machine and account is pushed."""

from __future__ import annotations

import getpass
import json
import random
import socket
from pathlib import Path, PurePosixPath

import pytest

from peft_ncgeo.hub.secrets import refuse_secrets

from .test_hub_errors import one_line
from .tuned import KINDS

KNOWN = {".safetensors", ".json", ".md", ".png", ".txt", ".jinja"}


def contents(hub, *repo_ids: str) -> dict[str, bytes]:
    """Every file of every commit."""
    return {
        f"{repo_id}/{commit.sha}/{path}": blob.content
        for repo_id in repo_ids
        for commit in hub.commits(repo_id)
        for path, blob in commit.files.items()
    }


def holders(files: dict[str, bytes], *secrets: str) -> set[tuple[str, str]]:
    return {(path, secret) for path, content in files.items() for secret in secrets if secret.encode() in content}


@pytest.fixture
def machine(author) -> list[str]:
    """Return the texts that identify the author: account, folders, names."""
    places = [
        str(author.home),
        str(author.work),
        author.work.parent.name,
        f"{Path.home()}/",
        str(Path(__file__).parents[2]),
    ]
    names = [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 3]
    return [*places, *names, "output_dir", "hub_token", "training_args"]


@pytest.mark.parametrize("lfs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(hub, pushed, machine, kind, lfs):
    files = contents(hub, pushed[kind, lfs][0])
    assert holders(files, hub.token, *machine) == set()
    suffixes = {PurePosixPath(path).suffix for path in files if not path.endswith(".gitattributes")}
    assert {".safetensors", ".json", ".md"} <= suffixes <= KNOWN


def test_arguments_and_a_base_with_paths_and_token(hub, author, machine):
    """The trainer, the base model and the tokenizer all come from folders."""
    paths = author.run(f"""
    import getpass, os, transformers
    from pathlib import Path
    from unittest import mock
    base, home = Path("bases", "clip").resolve(), Path("home-of-mine").resolve()
    tuned.tiny_clip().save_pretrained(base)
    tuned.tiny_processor().save_pretrained(base)
    paths = {{"HOME": str(home), "USER": "account-name", "LOGNAME": "account-name"}}
    with mock.patch.dict(os.environ, paths):
        assert getpass.getuser() == "account-name"
        config = tuned.NPTConfig(num_text_tokens=4, text_init="a photo of a", tokenizer_name_or_path=str(base))
        model = tuned.get_peft_model(CLIPModel.from_pretrained(base), config)
        run = tuned.trainer(
            home / "runs" / "first",
            model,
            eval_dataset=tuned.tiny_images(9, tuned.NEW),
            max_steps=1,
            run_name=str(home / "run"),
            hub_model_id="user/paths",
            hub_token={hub.token!r},
            push_to_hub=True,
            hub_strategy="every_save",
            save_strategy="steps",
            save_steps=1,
        )
        run.train()
        run.push_to_hub(base_model_id=tuned.CLIP)
        processor = transformers.CLIPProcessor.from_pretrained(base)
        push_adapter(run.model, "user/paths", processor, tuned.CLIP, run.record())
    result = [str(base), str(home), "account-name"]
    """)
    assert len(hub.commits("user/paths")) >= 2
    files = contents(hub, "user/paths")
    assert {"adapter_config.json", "tokenizer_config.json", "README.md"} <= {path.split("/")[-1] for path in files}
    assert holders(files, hub.token, *paths, *machine) == set()


SNEAKED = {  # how it gets in, and the file that is named
    "tokenizer": ("processor.tokenizer.add_tokens([{secret}])", "tokenizer.json"),
    "chat_template": ("processor.chat_template = {secret}", "chat_template.jinja"),
    "config": ("model.peft_config['default'].revision = {secret}", "adapter_config.json"),
    "template": ("model.peft_config['default'].template = {secret} + ' {{}}'", "README.md"),
    "card": ("card['tags'] = [{secret}]", "README.md"),
}


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ("str(Path.home() / 'photos' / 'x')", "a path of this machine"),
        ("str(Path.cwd() / 'x')", "a path of this machine"),
        ("tempfile.gettempdir() + '/x'", "a path of this machine"),
        ("huggingface_hub.get_token()", "the token"),
        ("'hf_' + 'a1B2' * 8", "what looks like a token of the Hub"),
    ],
    ids=["home", "work", "tmp", "token", "anybody's"],
)
@pytest.mark.parametrize(("way", "name"), SNEAKED.values(), ids=SNEAKED)
def test_what_sneaks_into_a_file_is_refused(hub, author, way, name, secret, said):
    author.run(f"""
    import huggingface_hub, tempfile
    from pathlib import Path
    model = tuned.get_peft_model(tuned.base(tuned.CLIP), tuned.NPTConfig(num_text_tokens=2))
    processor, card = tuned.tiny_processor(), {{}}
    {way.format(secret=secret)}
    """)
    message = one_line(author, "push_adapter(model, 'user/sneaked', processor, **card)", "ValueError", name, said)
    assert hub.token not in message
    assert "a1B2" not in message
    assert " in line " in message
    assert str(author.work) not in message
    assert "user/sneaked" not in hub.repos


def test_a_token_in_the_commit_message_is_refused(hub, author):
    author.run("model = tuned.get_peft_model(tuned.base(tuned.CLIP), tuned.NPTConfig(num_text_tokens=2))")
    call = "push_adapter(model, 'user/said', commit_message='by hf_' + 'a1B2' * 8)"
    message = one_line(author, call, "ValueError", "commit_message holds what looks like a token")
    assert "a1B2" not in message
    assert "user/said" not in hub.repos


MADE_UP = {
    "hf_" + "a1B2" * 8: "a token of the Hub",
    "ghp_" + "a1B2" * 9: "a token of GitHub",
    "github_pat_" + "a1B2_" * 9: "a token of GitHub",
    "sk-proj-" + "a1B2" * 9: "an API key",
    "AKIA" + "A1B2" * 4: "an API key",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    "of-the-environment": "the value of MY_SERVICE_API_KEY",
    "stands_in_HF_TOKEN": "the token",
}


@pytest.mark.parametrize(("secret", "said"), MADE_UP.items(), ids=MADE_UP.values())
@pytest.mark.parametrize("written", ["{}", "a\n\nb {} c", '["x{}x"]', "\x00\x01{}\x00"])
def test_secrets_of_any_kind_in_any_file(tmp_path, monkeypatch, secret, said, written):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "of-the-environment")
    monkeypatch.setenv("HF_TOKEN", "stands_in_HF_TOKEN")
    if "x{}x" in written and secret[:2] in ("sk", "AK"):
        written = written.replace("x{}", " {}")  # short beginnings are none inside a word
    (tmp_path / "inner").mkdir()
    for number, text in enumerate((secret, secret.replace("_", r"\_"))):
        file = tmp_path / "inner" / f"{number}.txt"
        content = written.format(text)
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"inner/{number}.txt holds .*{said} in line (1|3)\b") as refusal:
            refuse_secrets(tmp_path, "", None, {})
        assert secret not in str(refusal.value)
        assert f"in line {content[: content.index(text)].count(chr(10)) + 1}," in str(refusal.value)
        file.unlink()
        with pytest.raises(ValueError, match=f"tag holds .*{said}"):
            refuse_secrets(tmp_path, "", None, {"tag": content})


@pytest.mark.parametrize("home", ["/home/jürg ß👩", "/home/me", "C:\\Users\\name\\new", "/root"])
@pytest.mark.parametrize("inside", ["{}", "{}/photos", "in {}.", "a\n{}", "file://{}/x", "PATH=/bin:{}"])
@pytest.mark.parametrize("nested", range(4))
def test_a_path_however_it_is_written(tmp_path, monkeypatch, home, inside, nested):
    """As text, in JSON, and in JSON that is a string of JSON."""
    text = inside.format(home)
    for _ in range(nested):
        text = json.dumps({"x": text})
    (tmp_path / "a.json").write_text(f"first\n{text}", encoding="utf-8")
    with pytest.raises(ValueError, match="a.json.*[23]"):
        refuse_secrets(tmp_path, home, None, {})  # as what the base was loaded from
    if home[0] == "/":
        monkeypatch.setenv("HOME", home)
        with pytest.raises(ValueError, match="a.json.*[23]"):
            refuse_secrets(tmp_path, "", None, {})


def test_names_on_the_hub_are_no_paths(tmp_path, monkeypatch):
    """The home folder or the working folder has the same name as the user on the Hub."""
    text = "[user/base](https://huggingface.co/user/base) https://huggingface.co/datasets/user/birds user/base"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setenv("HOME", "/user")
    refuse_secrets(tmp_path, "user/base", None, {"repo_id": "user/name"})
    monkeypatch.setenv("HOME", "/user/base")
    refuse_secrets(tmp_path, "user/base", None, {"repo_id": "user/name"})
    (tmp_path / "README.md").write_text("/user/based /user/base-old /user/base.old")
    refuse_secrets(tmp_path, "user/base", None, {})


def test_the_tokens_of_the_environment_beside_the_one_that_is_passed(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, f"held-by-{name}")
        (tmp_path / "a.txt").write_text(f"x held-by-{name} x")
        with pytest.raises(ValueError, match="a.txt holds the"):
            refuse_secrets(tmp_path, "", "another-token", {})


def test_what_is_no_secret_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE_TOKEN", "a")  # too short to be told from a letter
    names = "risk-assessment-of-very-long-names-in-a-list, hf_hub_download, hf_transfer, skeleton, AKIAKI, a_TOKEN"
    (tmp_path / "class_names.json").write_text(names)
    (tmp_path / "random.bin").write_bytes(random.Random(0).randbytes(10**6))
    refuse_secrets(tmp_path, "user/base", None, {"commit_message": "Upload adapter", "revision": None})
