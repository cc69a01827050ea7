"""Gradio page to try a classifier; needs `pip install peft_ncgeo[demo]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

try:  # fails at import, before a model is loaded
    import gradio
except ImportError as error:
    raise ImportError(
        f"A demo needs gradio ({error}); install it with `pip install peft_ncgeo[demo]`, in an environment of its own."
    ) from error

from .classifiers.few_shot import HeadClassifier
from .classifiers.zero_shot import ZeroShotClassifier

SHOWN = 5  # largest number of classes with a bar


def build_app(
    classifier: Any, class_names: Sequence[str] | None = None, examples: Sequence[Any] = (), title: str = "Classifier"
) -> gradio.Blocks:
    """Return a page that takes an image and shows the most probable classes.

    If the classifier reads class names, a text box shows them, one on each line, and the user may change them.

    Args:
        classifier: a classifier of this package, such as [`~peft_ncgeo.ZeroShotClassifier`] or the result of
            [`~peft_ncgeo.adapt`].
        class_names: names in the box. Default: those of the classifier's training.
        examples: images to click on: paths or PIL images.
        title: heading of the page.

    Returns:
        The page; `launch()` shows it. Its API has one function, `/classify`.

    Raises:
        TypeError: the classifier has no probabilities.
        ValueError: `class_names` is given for a classifier with classes of its own, or the classes are not known.

    Example:

    ```python
    build_app(ZeroShotClassifier.from_pretrained("user/adapter"), ["red panda", "snow leopard"]).launch()
    ```
    """
    if not hasattr(classifier, "predict_proba"):
        raise TypeError(f"Expected a classifier with predict_proba, got {type(classifier).__name__}.")
    known = list(getattr(classifier, "classes", None) or getattr(classifier, "class_names", None) or [])
    open_names = reads_names(classifier)
    if class_names is not None and not open_names:
        raise ValueError(f"{type(classifier).__name__} has classes of its own; leave out class_names.")
    if not known and not open_names:
        raise ValueError(f"The classes of {type(classifier).__name__} are not known; set model.config.id2label.")

    def classify(image: Image.Image | None, names: str = "") -> dict[str, float]:
        if image is None:
            raise gradio.Error("Choose an image first.")
        listed = [name.strip() for name in names.splitlines() if name.strip()] if open_names else known
        try:
            asked = {"class_names": listed} if open_names else {}
            found = classifier.predict_proba([image], **asked)[0].tolist()
        except (TypeError, ValueError) as error:  # shown to the person: such as one name alone, or one twice
            raise gradio.Error(str(error)) from error
        return dict(zip(map(str, listed), found, strict=True))

    with gradio.Blocks(title=title) as app:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                inputs: list[Any] = [gradio.Image(type="pil", label="Image", height=320)]
                if open_names:
                    listed = known if class_names is None else class_names
                    box = gradio.Textbox(
                        "\n".join(listed), lines=6, max_lines=12, label="Class names, one on each line"
                    )
                    inputs.append(box)
                button = gradio.Button("Classify", variant="primary")
            label = gradio.Label(num_top_classes=SHOWN, label="Most probable classes")
        if examples:
            gradio.Examples([[example] for example in examples], inputs[:1])
        gradio.on([button.click, inputs[0].change], classify, inputs, label, api_name="classify")
    return app


def reads_names(classifier: Any) -> bool:
    """Return True if a classifier takes any class names."""
    if isinstance(classifier, HeadClassifier):
        return classifier.head.takes_new_names
    return isinstance(classifier, ZeroShotClassifier)
