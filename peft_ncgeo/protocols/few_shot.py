"""The protocol of few-shot episodes: every method on the same episodes of every domain, in resumable blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed

from ..classifiers.image_features import ImageFeatures
from ..data.episodes import EpisodeSampler
from ..data.images import LabelledImages
from ..data.processors import image_processor
from ..few_shot.evaluate import embed_images, evaluate_heads, evaluate_residual_adapters
from ..tuners.copa import CoPAConfig
from .cached_runs import cell_path, check_distinct, damaged
from .episode_results import EpisodeResults
from .fingerprints import dataset_fingerprint, fingerprint
from .shared_cells import Cell, fill_cells

_BLOCK, _SMALL_BLOCK = 100, 10  # episodes in a file; fewer for methods that need seconds for each


@dataclass(frozen=True)
class FewShotMethod:
    """Few-shot method: one row of the table.

    Args:
        name: name of the row.
        config: fields of a [`~peft_ncgeo.CoPAConfig`].
        settings: arguments of [`~peft_ncgeo.adapt`]: steps, lr, weight_decay, optimizer; with residual adapters also
            adapter_lr and batch_size.
        episodes: number of episodes of each domain, the first ones; None: all.

    Raises:
        ValueError: an unknown setting, or no episodes.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    episodes: int | None = None

    def __post_init__(self) -> None:
        maps = ("adapter_lr", "batch_size") if self.residual_adapters else ()
        known = ("steps", "lr", "weight_decay", "optimizer", *maps)
        unknown = set(self.settings) - set(known)
        if unknown:
            raise ValueError(
                f"{self.name}: there is no setting {min(unknown)!r} for this method; known are {', '.join(known)}."
            )
        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"{self.name}: episodes={self.episodes} must be at least 1, or None for all.")

    @property
    def residual_adapters(self) -> bool:
        """True if every episode also trains residual adapters in the backbone."""
        return bool(self.config.get("residual_adapters"))


def few_shot(
    methods: Sequence[FewShotMethod],
    domains: Mapping[str, Dataset],
    model: Callable[[], nn.Module],
    processor: Any,
    output_dir: str | Path,
    episodes: int = 600,
    seen: Sequence[str] = (),
    image_column: str = "image",
    batch_size: int = 8,
    **sampling: Any,
) -> EpisodeResults:
    """Evaluate every method on the same episodes of every domain.

    Images are embedded once for each domain, and heads are trained for `batch_size` episodes at a time; only methods
    with residual adapters run the backbone in every episode. Blocks of episodes are small JSON files under
    `output_dir/<domain>/<method>`, so a run that was stopped can be continued, also with more episodes, and several
    processes can share the blocks, see [`fill_cells`].

    Args:
        methods: rows, with different names.
        domains: name -> labelled images.
        model: function that makes the backbone, with the same weights at every call.
        processor: its image processor.
        episodes: number of episodes of each domain; a larger number starts with the same episodes.
        seen: domains that the backbone was pre-trained on, for the averages.
        sampling: arguments of [`~peft_ncgeo.data.EpisodeSampler`]: ways, shots, seed and others.

    Returns:
        [`EpisodeResults`] with one row for each domain, method and episode. A row has

        - `ways` and `support`: the numbers of classes and of support images;
        - `accuracy`: on the query images, in percent;
        - `gap_before`, `gap_after`: the gap between images and prototypes of the support set;
        - `nc1_before`, `nc1_after`: NC1 of the query images' unit features;
        - `sweep_gaps`, `sweep_losses`: the contrast loss of the query images when their gap is shifted, at temperature
          exp(-2) for every method, see [`~peft_ncgeo.geometry.loss_against_gap`];
        - `seconds`: CPU seconds of training; for cached features without the time of embedding.

    Raises:
        ValueError: no domains or episodes, two methods with one name, a name in `seen` that is no domain, a domain
            too small for the episodes, or a block that is damaged or of a run with other inputs.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"Methods must have different names, got {names}.")
    if not domains or episodes < 1:
        raise ValueError(f"Pass at least one domain and one episode, got {len(domains)} domains, episodes={episodes}.")
    unknown = set(seen) - set(domains)
    if unknown:
        raise ValueError(f"seen names {sorted(unknown)[0]!r}, which is not a domain; name only keys of domains.")
    label_column = sampling.get("label_column", "label")
    samplers = {name: EpisodeSampler(dataset, **sampling) for name, dataset in domains.items()}
    images = {
        name: LabelledImages(dataset.with_format(None), image_column, label_column)
        for name, dataset in domains.items()
    }
    set_seed(0)  # an unused head may get random weights, which must be the same in a continued run
    encoder = ImageFeatures(model().eval(), processor)
    of_inputs = fingerprint("The model", encoder.model), fingerprint("The processor", image_processor(processor))
    of_domain = {name: dataset_fingerprint(part.dataset, label_column) for name, part in images.items()}
    of_method = {m.name: fingerprint(f"Method {m.name!r}", m.config, m.settings) for m in methods}
    blocks = [block for domain in domains for method in methods for block in _blocks(domain, method, episodes)]
    paths = [_block_path(output_dir, *block) for block in blocks]
    check_distinct(paths)
    cached: dict[str, Tensor] = {}

    def cell(domain: str, method: FewShotMethod, start: int, end: int, path: Path) -> Cell:
        def compute() -> dict[str, Any]:
            if domain not in cached:
                cached.clear()
                cached[domain] = embed_images(encoder, images[domain])
            drawn = [samplers[domain][i] for i in range(start, end)]
            given = CoPAConfig(**method.config), method.settings, drawn, cached[domain]
            if method.residual_adapters:
                return {"rows": evaluate_residual_adapters(*given, images[domain], model(), processor)}
            return {"rows": evaluate_heads(*given, batch_size)}

        parts = [of_inputs, image_column, of_domain[domain], of_method[method.name], sampling, start, end]
        return Cell(path, fingerprint("A block of episodes", *parts), f"{domain}, {method.name}", compute)

    filled = fill_cells([cell(*block, path) for block, path in zip(blocks, paths, strict=True)], "block")
    rows: list[dict[str, Any]] = []
    for (domain, method, start, end), path, found in zip(blocks, paths, filled, strict=True):
        kept: Any = found.get("rows")
        whole = isinstance(kept, list) and all(isinstance(row, dict) for row in kept)
        if not whole or len(kept) != end - start:
            raise damaged(path, f"it must hold {end - start} rows")
        keys = ({"domain": domain, "method": method.name, "episode": i} for i in range(start, end))
        rows += [{**key, **row} for key, row in zip(keys, kept, strict=True)]
    return EpisodeResults(rows, list(domains), names, list(seen))


def _blocks(domain: str, method: FewShotMethod, episodes: int) -> list[tuple[str, FewShotMethod, int, int]]:
    """Return the blocks of a method on a domain: the first episode of each, and the one after its last."""
    count = episodes if method.episodes is None else min(method.episodes, episodes)
    size = _SMALL_BLOCK if method.residual_adapters else _BLOCK
    return [(domain, method, start, min(start + size, count)) for start in range(0, count, size)]


def _block_path(folder: str | Path, domain: str, method: FewShotMethod, start: int, end: int) -> Path:
    return cell_path(folder, domain, method.name, start).with_name(f"episodes-{start}-{end}.json")
