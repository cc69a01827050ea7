"""The Gradio page answers as the classifier does; `make demo-app-test` runs this where gradio is installed."""

from __future__ import annotations

import sys

import pytest
from peft import get_peft_model

from peft_ncgeo import CoPAConfig, ZeroShotClassifier, adapt

from .conftest import NAMES, tiny_clip, tiny_images, tiny_processor

IMAGES = tiny_images(6)["image"][:]


def test_a_missing_gradio_is_told_at_the_import(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_ncgeo.demo_app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it raises
    with pytest.raises(ImportError, match=r"peft_ncgeo\[demo\]") as caught:
        import peft_ncgeo.demo_app  # noqa: F401
    assert "\n" not in str(caught.value)


@pytest.fixture
def shown(tmp_path):
    """A function that shows a classifier and returns how its page answers for a file."""
    pytest.importorskip("gradio", reason="gradio is not installed; it wants an environment of its own")
    from gradio_client import Client, handle_file

    from peft_ncgeo.demo_app import build_app

    IMAGES[1].save(tmp_path / "image.png")
    apps = []

    def show(classifier, *options):
        app = build_app(classifier, *options)
        apps.append(app)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        client = Client(url, verbose=False)
        return lambda *names: client.predict(handle_file(tmp_path / "image.png"), *names, api_name="/classify")

    yield show
    for app in apps:
        app.close()


def confidences(answer) -> dict[str, float]:
    return {bar["label"]: bar["confidence"] for bar in answer["confidences"]}


def test_the_page_answers_as_the_classifier(shown):
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    ask = shown(classifier, NAMES)
    for names in (NAMES, ["red bird", "blue tree", "green cat"]):
        expected = dict(zip(names, classifier.predict_proba(IMAGES[1:2], names)[0].tolist(), strict=True))
        assert confidences(ask("\n".join(names))) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(Exception, match="two class names"):
        ask("cat")


def test_a_classifier_with_classes_of_its_own_has_no_box(shown):
    model = get_peft_model(tiny_clip(), CoPAConfig())
    classifier = adapt(model, IMAGES, [0, 1] * 3, steps=1, processor=tiny_processor().image_processor)
    expected = classifier.predict_proba(IMAGES[1:2])[0].tolist()
    assert confidences(shown(classifier)()) == pytest.approx({"0": expected[0], "1": expected[1]}, abs=1e-5)
    with pytest.raises(ValueError, match="classes of its own"):
        shown(classifier, NAMES)
