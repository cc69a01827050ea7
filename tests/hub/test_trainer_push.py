"""A trainer with `push_to_hub`: each save, the end, and a Hub that refuses."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from .test_hub_errors import one_line

pytestmark = pytest.mark.slow

SAVE = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture
def start(author):
    """Makes the snippet that builds `run`, whose warnings `train()` returns."""
    author.run("""
    import shutil
    def train(run):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train()
        assert run.state.global_step == 2
        return [str(warning.message) for warning in caught if "push" in str(warning.message)]

    def build(name, model=None, **arguments):
        shutil.rmtree(name, ignore_errors=True)
        model = model or tuned.get_peft_model(tuned.base(tuned.CLIP), tuned.NPTConfig(num_text_tokens=2))
        sets = tuned.tiny_images(9, tuned.NEW)
        return tuned.trainer(name, model, eval_dataset=sets, **arguments)
    """)
    return lambda name, **arguments: f"run = build({name!r}, **{ {**SAVE, **arguments}!r})"


def titles(hub, repo_id: str) -> list[str]:
    return [commit.title for commit in hub.commits(repo_id)[1:]]


def test_every_save_is_a_commit(hub, author, reader, start):
    said = author.run(f"""
    {start("each-save", hub_strategy="every_save")}
    assert train(run) == []
    result = tuned.answers(run.model)
    """)
    assert titles(hub, "user/each-save") == ["Training in progress, step 1", "Training in progress, step 2"]
    first, last = (commit.sha for commit in hub.commits("user/each-save")[1:])
    assert reader.run("result = tuned.answers(load_adapter('user/each-save'))") == said
    assert reader.run(f"result = tuned.answers(load_adapter('user/each-save', revision={first!r}))") != said
    card = hub.files("user/each-save", last)["README.md"].decode()
    assert "## Results" not in card  # nothing is evaluated in the middle of training
    assert "learning_rate" in card


@pytest.mark.parametrize("fault", ["refuse_writes", "drop_upload_after"])
def test_training_goes_on_when_the_hub_refuses(hub, author, start, fault):
    author.run(start(f"faulty-{fault}", hub_strategy="every_save"))
    setattr(hub, fault, 1 if fault == "drop_upload_after" else True)
    warned = author.run("result = train(run)")
    assert len(warned) == 2
    assert all(message.startswith(f"user/faulty-{fault} was not pushed: ") for message in warned)
    assert titles(hub, f"user/faulty-{fault}") == []
    setattr(hub, fault, None if fault == "drop_upload_after" else False)
    author.run("run.push_to_hub()")
    assert titles(hub, f"user/faulty-{fault}") == ["End of training"]


def test_training_goes_on_when_the_base_is_a_folder(hub, author, start):
    warned = author.run(f"""
    tuned.tiny_clip().save_pretrained("a-base")
    model = tuned.get_peft_model(CLIPModel.from_pretrained("a-base"), tuned.NPTConfig(num_text_tokens=2))
    {start("folder-base", hub_strategy="every_save").replace("build('folder-base'", "build('folder-base', model")}
    result = [train(run)]
    """)[0]
    assert titles(hub, "user/folder-base") == []
    assert len(warned) == 2
    assert all("the folder 'a-base'" in message and "base_model_id" in message for message in warned)


def test_at_the_end_saving_pushes(hub, author, start):
    author.run(f"{start('at-the-end', hub_strategy='end')}\ntrain(run)")
    assert titles(hub, "user/at-the-end") == []
    author.run("run.save_model()")
    assert titles(hub, "user/at-the-end") == ["Model save"]
    assert b"## Results" in hub.files("user/at-the-end")["README.md"]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_for_the_hub(hub, author, start, strategy):
    said = f"hub_strategy='{strategy}' would publish pickled states"
    one_line(author, start("checkpoints", hub_strategy=strategy), "ValueError", said, "'end' or 'every_save'")
    assert "user/checkpoints" not in hub.repos


def test_push_to_hub_by_hand(hub, author, start):
    sha, evaluated = author.run(f"""
    from unittest import mock
    {start("by-hand", push_to_hub=False, save_strategy="no", hub_model_id="user/by-hand")}
    train(run)
    record = run.record()
    with mock.patch.object(type(run), "predict") as predict:
        options = dict(license="mit", tags="colours", dataset_tags="user/colours", dataset="Colours", language="en")
        ignored = dict(model_name="x", tasks="y", dataset_args="z")
        commit = run.push_to_hub("Done", record=record, revision="v1", private=True, **options, **ignored)
    result = [commit.oid, predict.call_count]
    """)
    assert evaluated == 0  # the record was given
    assert hub.repos["user/by-hand"].private
    assert [commit.title for commit in hub.commits("user/by-hand", "v1")[1:]] == ["Done"]
    assert hub.commits("user/by-hand", "v1")[-1].sha == sha
    assert titles(hub, "user/by-hand") == []
    data = ModelCard(hub.files("user/by-hand", "v1")["README.md"].decode()).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["user/colours"])
    assert "colours" in data.tags
    assert {result.dataset_name for result in data.eval_results} == {"Colours"}
    one_line(author, "run.push_to_hub(blocking=False)", "ValueError", "blocking=False is not supported")
    named = "run.push_to_hub(base_model_id='user/tiny-clip', finetuned_from='user/missing', record=record)"
    author.run(named)


def test_create_model_card_writes_into_the_output_folder(author, start):
    author.run(f"""
    {start("card-only", push_to_hub=False, save_strategy="no")}
    train(run)
    log, callbacks = list(run.state.log_history), list(run.callback_handler.callbacks)
    run.create_model_card(license="mit", tags=["a", "b"], model_name="user/named", dataset_tags=["user/colours"])
    assert run.state.log_history == log and run.callback_handler.callbacks == callbacks
    """)
    folder = author.work / "card-only"
    assert {"README.md", "geometry.png"} >= {path.name for path in folder.iterdir()} - {"checkpoint-1", "checkpoint-2"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert {"peft_ncgeo", "a", "b"} <= set(card.data.tags)
    assert 'from_pretrained("user/named")' in card.text
    assert "## Results" in card.text
