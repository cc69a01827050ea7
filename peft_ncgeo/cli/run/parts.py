"""Parts of a set of images of the user's own."""

from __future__ import annotations

from datasets import Dataset, DatasetDict

from ...data import load_images
from ...training import GeometryTrainingArguments


def load_parts(source: str, args: GeometryTrainingArguments) -> DatasetDict:
    """Load `train` and the other parts that a folder or a data set of the Hub has; one without parts is `train`.

    Raises:
        ValueError: there is no part `train`, or as [`~peft_ncgeo.data.load_images`] does.
    """
    parts = load_images(source, image_column=args.image_column, label_column=args.label_column)
    if isinstance(parts, Dataset):
        return DatasetDict(train=parts)
    if "train" not in parts:
        raise ValueError(f"{source} must have a part named 'train'; it has {sorted(parts)}.")
    return parts
