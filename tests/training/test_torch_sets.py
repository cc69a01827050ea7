"""Streams and data sets of torch: the same gradients, weights and metrics as of a `datasets.Dataset`."""

from __future__ import annotations

import pytest
import torch
from datasets import DatasetDict
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Subset

from peft_ncgeo.losses import LDAM
from peft_ncgeo.training import PromptAveraging

from ..conftest import NAMES, tiny_images
from .runs import Gradients, trainer, weights

STILL = {"learning_rate": 0.0, "optim_args": "momentum=0.0", "augmentation": "none"}


class Pairs(TorchDataset):
    """As torchvision's `ImageFolder`."""

    def __init__(self, rows, classes=tuple(NAMES)):
        self.rows, self.classes = rows, list(classes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]["image"], self.rows[i]["label"]


class Stream(IterableDataset):
    """Of dicts, with a label as torch's sets often have it, and names as text."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        for i, row in enumerate(self.rows):
            yield {**row, "label": NAMES[row["label"]] if i % 2 else torch.tensor(row["label"])}


def gradients(tmp_path, train, steps, **options):
    kept = Gradients()
    trainer(tmp_path, train=train, callbacks=[kept], max_steps=steps, **STILL, **options).train()
    return kept.steps


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("torchs_own", [False, True])
def test_a_stream_is_read_in_order_again_and_again(tmp_path, torchs_own):
    """20 images in batches of 8: the third batch holds the last four and the first four."""
    rows = tiny_images(20).shuffle(seed=1)
    stream = Stream(rows) if torchs_own else rows.to_iterable_dataset(num_shards=2)
    names = {"class_names": NAMES} if torchs_own else {}
    found = gradients(tmp_path, stream, 3, classification_loss=LDAM(), class_counts=[4] * 5, **names)
    alone = trainer(tmp_path, train=tiny_images(5), classification_loss=LDAM())  # as many of each class
    inputs = alone.data_collator([rows[row] for row in [*range(16, 20), *range(4)]])
    alone.features.begin(dict(alone.task.texts(NAMES)))
    alone.compute_loss(alone.extractor, inputs).backward()
    same(found[2], {n: p.grad for n, p in alone.model.named_parameters() if p.requires_grad})


@pytest.mark.slow
def test_a_stream_resumes_exactly_past_its_end(tmp_path):
    rows = tiny_images(20)
    options = {"augmentation": "crop_flip", "save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    stream = rows.to_iterable_dataset().shuffle(seed=3, buffer_size=6)
    whole = trainer(tmp_path / "whole", train=stream, **options)
    whole.train()
    again = trainer(tmp_path / "again", train=rows.to_iterable_dataset().shuffle(seed=3, buffer_size=6), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.state.global_step == 6
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_a_set_of_torch_trains_as_the_same_rows(tmp_path):
    """With numbered rows, so the order is the same too; its names come from `.classes`, also inside a subset."""
    rows, test = tiny_images(24), tiny_images(10, seed=1)
    sets = {"rows": (rows, test), "pairs": (Subset(Pairs(rows), range(24)), Pairs(test))}
    found, metrics = {}, {}
    for name, (train, test_set) in sets.items():
        options = {"eval_dataset": test_set, "augmentation": "crop_flip", "num_train_epochs": 1}
        options["per_device_eval_batch_size"] = 5  # of a shorter last batch, Transformers' mean needs its size
        run = trainer(tmp_path / name, train=train, **options)
        run.train()
        found[name], metrics[name] = weights(run.model), run.evaluate()
        assert run.record().sets["test"]["size"] == 10
    same(found["pairs"], found["rows"])
    assert metrics["pairs"]["eval_accuracy"] == metrics["rows"]["eval_accuracy"]
    assert metrics["pairs"]["eval_loss"] == pytest.approx(metrics["rows"]["eval_loss"], rel=1e-4)
    streamed = run.evaluate(test.to_iterable_dataset())
    assert streamed["eval_loss"] == pytest.approx(metrics["rows"]["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_refusals_name_what_is_missing(tmp_path):
    rows = tiny_images(20)
    stream, pairs = rows.to_iterable_dataset(), Pairs(rows)
    for expected, options in (
        ("max_steps", {"train": stream}),
        ("class_names=", {"train": Stream(rows), "max_steps": 2}),
        ("class_names.*not those", {"train": pairs, "class_names": ["cat", "dog"]}),
        ("class_counts=", {"train": pairs, "classification_loss": LDAM()}),
        ("3 numbers for 5", {"train": pairs, "classification_loss": LDAM(), "class_counts": [1, 2, 3]}),
        ("class_counts.*leave them out", {"train": rows, "class_counts": [4] * 5}),
        ("num_views", {"train": stream, "max_steps": 2, "num_views": 2, "augmentation": "crop_flip"}),
        ("class_balanced_sampling", {"train": pairs, "class_balanced_sampling": True}),
        (r"data\['train'\]", {"train": DatasetDict(train=rows, test=rows)}),
    ):
        with pytest.raises((TypeError, ValueError), match=expected) as refused:
            trainer(tmp_path, **options)
        assert "\n" not in str(refused.value)
    bad = [{**rows[0], "label": 7}] * 8
    pixels = [{"image": torch.zeros(3, 8, 8), "label": 0}] * 8
    for expected, options in (
        ("label 7 is not one of the 5", {"train": Pairs(bad)}),
        ("Tensor.*ToTensor", {"train": Pairs(pixels)}),
        ("no samples", {"train": Stream([]), "class_names": NAMES, "max_steps": 2}),
        ("epochs", {"train": stream, "max_steps": 2, "callbacks": [PromptAveraging()]}),
    ):
        with pytest.raises(ValueError, match=expected):
            trainer(tmp_path, **options).train()
