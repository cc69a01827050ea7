"""Parts (train, validation, test) of the user's own images."""

from __future__ import annotations

from datasets import Dataset, DatasetDict

from ...data import load_images
from ...training import GeometryTrainingArguments


def load_parts(source: str, args: GeometryTrainingArguments) -> DatasetDict:
    """Load `train` and the other parts of a folder or a data set of the Hub; images without parts become `train`.

    Raises:
        ValueError: there is no part `train`, or as in [`~peft_ncgeo.data.load_images`].
    """
    parts = load_images(source, image_column=args.image_column, label_column=args.label_column)
    if isinstance(parts, Dataset):
        return DatasetDict(train=parts)
    if "train" not in parts:
        raise ValueError(f"{source} must have a part named 'train'; it has {sorted(parts)}.")
    return parts
