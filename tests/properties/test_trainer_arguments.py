"""A trainer's argument of a wrong kind is refused by name before training starts."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.losses import LDAM

from ..conftest import tiny_images, tiny_processor
from ..profiles import cases
from ..training.runs import lora_clip
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
IMAGES = tiny_images(10)
wild = st.integers(-2, 3) | st.floats() | st.text(max_size=3) | st.lists(st.integers(0, 1), min_size=1, max_size=2)
wild |= st.sampled_from([object(), b"x", [None], {"image": [1]}, IMAGES.to_iterable_dataset(), Dataset.from_dict({})])
PARTS = ["model", "args", "train_dataset", "eval_dataset", "processing_class", "losses", "classification_loss"]
PARTS += ["class_names", "teacher", "teacher_processor"]
SETTINGS = ["template", "frozen_templates", "student_templates", "image_column", "label_column", "augmentation"]
SETTINGS += ["num_views", "class_balanced_sampling"]


@pytest.fixture(scope="module")
def model():
    return lora_clip()


@cases(0.7)
@given(name=st.sampled_from(PARTS + SETTINGS), value=wild)
@example(name="classification_loss", value=5)
@example(name="frozen_templates", value="a {}.")
@example(name="num_views", value=1.5)
@example(name="class_balanced_sampling", value="no")
@example(name="losses", value=[LDAM()])
def test_one_thing_of_another_kind(tmp_path_factory, model, name, value):
    folder = str(tmp_path_factory.getbasetemp())
    if name == "model" and isinstance(value, str):
        value = f"/nowhere/{value}"  # the Hub is not asked
    made = {"model": model, "train_dataset": IMAGES, "processing_class": tiny_processor()}

    def construct() -> GeometryTrainer:
        if name in PARTS:
            return GeometryTrainer(**{"args": GeometryTrainingArguments(folder), **made, name: value})
        return GeometryTrainer(args=GeometryTrainingArguments(folder, **{name: value}), **made)

    run = said_well(construct)
    # as if it were not given, or as it may well be
    unread = not value and name in ("template", "frozen_templates", "student_templates", "losses")
    right = name == "num_views" and isinstance(value, int) and value >= 0
    assert (run is not None) <= (unread or right)
