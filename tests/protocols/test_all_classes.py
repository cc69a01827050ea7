"""The protocol of all classes: every name is trained and tested, in a tail or with all images."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.protocols import all_classes
from peft_ncgeo.training import Recipe

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_zero_shot_on_all_names_and_on_a_tail(tmp_path):
    train, test = tiny_images(40), tiny_images(23, seed=1)
    tails = {"all": {}, "tail": {"imbalance_factor": 4, "n_max": 8}}
    data = ([Recipe("zero-shot")], train, test, tiny_clip, tiny_processor(), tmp_path)
    results = all_classes(*data, tails=tails, seeds=(1,))
    predicted = ZeroShotClassifier(tiny_clip(), tiny_processor()).predict(test["image"][:], NAMES)
    found, labels = np.array([NAMES.index(name) for name in predicted]), np.array(test["label"][:])
    for row in results.rows:
        assert row["accuracy"] == pytest.approx(100 * np.mean(found == labels))
        assert row["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, found))
        assert (row.get("many") is not None) == (row["setting"] == "tail")
    with pytest.raises(ValueError, match="white panda"):
        all_classes(*data[:1], tiny_images(16, NAMES[:4]), *data[2:-1], tmp_path / "other", seeds=(1,))


@pytest.mark.slow
def test_two_classes_are_trained_and_two_names_are_tested(tmp_path):
    args = {"num_train_epochs": 1, "batch_size": 4, "learning_rate": 0.01, "max_steps": 1}
    coop = Recipe.from_dict("coop", {"peft": {"NPTConfig.coop": {"num_text_tokens": 4}}, "args": args})
    two = [tiny_images(8, NAMES[:2], seed) for seed in (0, 1)]
    (row,) = all_classes([coop], *two, tiny_clip, tiny_processor(), tmp_path, seeds=(1,)).rows
    assert row["accuracy"] % 12.5 == pytest.approx(0)  # of eight images
    assert "loss/ce" in row
