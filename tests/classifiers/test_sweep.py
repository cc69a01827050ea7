"""The fraction that a sweep chooses, and the images it is chosen on, against recomputed accuracies."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from peft_ncgeo.hub import create_card, save_adapter
from peft_ncgeo.hub.record import record_model
from peft_ncgeo.training import Sweep, align_classifier, interpolate, sweep_alignment, sweep_interpolation

from ..conftest import tiny_images, tiny_processor
from ..training.runs import lora_vit, pixels_and_labels

ROWS = [
    {"fraction": 0.0, "accuracy": 0.9, "balanced_accuracy": 0.5},
    {"fraction": 0.5, "accuracy": 0.8, "balanced_accuracy": 0.7},
    {"fraction": 1.0, "accuracy": 0.8, "balanced_accuracy": 0.7},
]


def test_a_sweep_chooses_by_balanced_accuracy_and_says_on_what():
    sweep = Sweep(ROWS, "balanced_accuracy", [90, 5])
    assert (sweep.fraction, sweep.best) == (0.5, ROWS[1])  # of equal ones the smallest change
    assert Sweep(ROWS, "accuracy", [90, 5]).fraction == 0.0
    assert sweep == ROWS
    assert json.loads(json.dumps(sweep)) == ROWS  # still the list that it was
    assert all(words in repr(sweep) for words in ("0.5", "balanced accuracy", "5 to 90"))
    with pytest.warns(UserWarning, match="4 validation images of class 'crab'"):
        Sweep(ROWS, "accuracy", [90, 4], ["fish", "crab"])


@pytest.mark.slow
def test_an_unbalanced_validation_set_does_not_choose_for_its_largest_class(tmp_path):
    """The sweep's choice is the argmax of the mean of recalls that are counted here, image by image."""
    model, train, processor = lora_vit(), tiny_images(40), tiny_processor()
    images = tiny_images(60, seed=5)
    kept = [i for i, label in enumerate(images["label"]) if label == 0 or i < 25]  # 12 of class 0, 5 of the others
    validation = images.select(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep = sweep_alignment(model, train, validation, (0.0, 0.3, 0.6, 1.0), processor)
    assert sweep.class_counts == [12, 5, 5, 5, 5]
    pixels, labels = pixels_and_labels(validation)
    labels, found = torch.tensor(labels), []
    for row in sweep:
        aligned = align_classifier(model, train, row["fraction"], processor)
        with torch.no_grad():
            predicted = model.eval()(pixel_values=pixels).logits.argmax(1)
        aligned.undo()
        found.append(sum(float((predicted[labels == k] == k).float().mean()) for k in range(5)) / 5)
    assert sweep.fraction == sweep[max(range(4), key=lambda i: (round(found[i], 9), -i))]["fraction"]
    assert [row["balanced_accuracy"] for row in sweep] == pytest.approx(found)

    aligned = align_classifier(model, train, sweep, processor, validation)
    assert aligned.fraction == sweep.fraction
    assert "5 to 12" in repr(aligned)
    assert record_model(model).post_hoc == [
        f"the head was turned by {sweep.fraction:g} of the angle to the class means, {sweep.basis}"
    ]
    save_adapter(model, tmp_path / "out", processor.image_processor)
    assert "5 to 12 validation images" in (tmp_path / "out" / "README.md").read_text()
    aligned.undo()
    assert "5 to 12" not in str(create_card(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The fraction")
def test_an_interpolation_of_a_sweep_and_what_is_refused():
    model, images, processor = lora_vit(), tiny_images(20), tiny_processor()
    sweep = sweep_interpolation(model, images, (0.0, 1.0), processor, metric="accuracy")
    mixed = interpolate(model, sweep)
    assert (mixed.fraction, mixed.basis) == (sweep.fraction, sweep.basis)
    assert "4 validation images" in record_model(model).post_hoc[0]
    mixed.undo()
    assert record_model(model).post_hoc == []
    with pytest.raises(ValueError, match="metric='recall' must be one of"):
        sweep_interpolation(model, images, (0.0, 1.0), processor, metric="recall")
    with pytest.raises(ValueError, match="no fractions"):
        interpolate(model, Sweep([], "accuracy", []))
