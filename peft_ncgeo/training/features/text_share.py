"""Distribution of class texts over processes, each of which encodes its share."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...geometry.sphere import mean_directions
from ...models.feature_extractor import FeatureExtractor, extract_features
from ..gathering import gather_batch, process_index, world_size


class TextShare:
    """Share of texts that this process encodes; the features of all processes are gathered in the order of the texts.

    The longest texts are distributed first, each to the process with the fewest tokens so far. A process without a
    text encodes one that does not count, since all processes must take part in each pass of the model.

    Args:
        texts: `input_ids` (K, L), and an `attention_mask` (K, L) unless all texts are of full length. With `counts`,
            classes may have several texts, whose features are averaged, see [`mean_directions`].

    Attributes:
        own: the texts of this process.
    """

    def __init__(self, texts: Mapping[str, Any]) -> None:
        texts = dict(texts)
        self._counts: list[int] | None = texts.pop("counts", None)
        self.own, self.sizes = texts, [0]
        self._order: Tensor | None = None
        if world_size() == 1 or not texts:
            return
        ids = texts["input_ids"]
        lengths = texts["attention_mask"].sum(1).tolist() if "attention_mask" in texts else [ids.shape[1]] * len(ids)
        shares = deal(lengths, world_size())
        mine = torch.tensor(shares[process_index()] or [0], device=ids.device)
        self.own = {name: value[mine] for name, value in texts.items()}
        self.sizes = [len(share) for share in shares]
        places = torch.tensor([k for share in shares for k in share], device=ids.device)
        self._order = places.argsort()

    def gather(self, features: Tensor) -> Tensor:
        """Return the features (K, d) of all classes from those of this process's texts, differentiable."""
        if self._order is not None:
            features = gather_batch(features, self.sizes).index_select(0, self._order)
        return mean_directions(features, self._counts)


def deal(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Return the numbers of the texts of each process, in their order."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    load = [(0, process) for process in range(processes)]  # a heap: tokens, and the process
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        tokens, process = load[0]
        shares[process].append(k)
        heapq.heapreplace(load, (tokens + lengths[k], process))
    return [sorted(share) for share in shares]


def class_features(extractor: FeatureExtractor, texts: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return the text features (K, d) of classes, all encoded on this process.

    Args:
        texts: result of a task's `texts`: the texts of the classes, with `counts` if a class has several texts.
    """
    moved: dict[str, Any] = {
        name: part.to(device) if isinstance(part, Tensor) else part for name, part in texts.items()
    }
    counts = moved.pop("counts", None)
    return mean_directions(extract_features(extractor, **moved)["text_features"], counts)
