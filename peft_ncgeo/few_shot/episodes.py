"""Training heads for images and prototypes on cached features: one episode, or many in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..geometry.checks import DeferredChecks
from ..geometry.contrast import TEMPERATURE, prototype_cross_entropy, prototype_image_contrast
from ..geometry.heads import Heads, class_prototypes
from ..tuners.copa import CoPAConfig
from ..validation import not_negative, reason, shown, whole_number

Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ADAPTER_LR = 0.1  # of the heads' learning rate, as TSA's maps learn beside CoPA's heads


def head_settings(config: CoPAConfig) -> dict[str, Any]:
    """What [`fit_heads`] is told about a config: CoPA's loss, or for a shared head URL's."""
    objective: Objective = prototype_cross_entropy if config.shared else prototype_image_contrast
    return {"shared": config.shared, "temperature": config.temperature, "objective": objective}


def fit_heads(
    features: Tensor,
    labels: Tensor,
    steps: int = 50,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    *,
    shared: bool = False,
    temperature: float = TEMPERATURE,
    objective: Objective = prototype_image_contrast,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    embed: Callable[[], Tensor] | None = None,
    maps: Sequence[nn.Parameter] = (),
    adapter_lr: float = ADAPTER_LR,
) -> Heads:
    """Train heads on support features, from the identity.

    With leading indices every one is an episode of its own: their losses are added up and the optimiser works number
    by number, so that all of them together give what one by one would, to rounding.

    Args:
        features: (N, d) or (E, N, d), of the frozen backbone; computed with in float32 or wider, autocast or not.
        labels: (N,) or (E, N), the episode's classes as 0, 1, ...; -1: padding.
        steps, lr, weight_decay: of the optimiser; weight decay is added to the gradient, as torch's Adam does.
        shared: one head for both.
        temperature: tau, which divides cosines.
        objective: of instances (..., N, d), prototypes (..., K, d), labels and temperature.
        optimizer: any of torch's that works number by number, in steps without a closure.
        embed: gives the features anew, with gradients, where `maps` in the backbone are trained too.
        maps: what is trained beside the heads, with `adapter_lr` times their learning rate.

    Raises:
        TypeError: a value that is no number, or an optimizer that does not take lr and weight_decay.
        ValueError: features that are not finite, shapes that do not fit, a value out of range.
        FloatingPointError: the loss was not finite in one of the steps.
    """
    if features.dim() not in (2, 3) or features.shape[:-1] != labels.shape:
        raise ValueError(
            f"features must be (N, d) or (E, N, d) with a label a row, got {tuple(features.shape)} and labels "
            f"{tuple(labels.shape)}."
        )
    steps = whole_number("steps", steps, least=0)
    lr, weight_decay, adapter_lr = (
        not_negative(name, value)
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("adapter_lr", adapter_lr))
    )
    if not callable(optimizer):
        raise TypeError(f"optimizer must be one of torch's, such as torch.optim.Adam, got {shown(optimizer)}.")
    finite = features.isfinite().all(-1) | (labels < 0)
    if not finite.all():
        raise ValueError(f"The features of support image {(~finite).nonzero()[0].tolist()[-1]} are not finite.")
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    features = features.masked_fill((labels < 0)[..., None], 0)  # padding times a weight of 0 must be 0
    prototypes = class_prototypes(features, labels, int(labels.max()) + 1)
    heads = Heads.identity(features, shared)
    learned = [heads.image.requires_grad_()] if shared else [head.requires_grad_() for head in heads]
    groups: list[dict[str, Any]] = [{"params": learned}]
    if maps:
        groups.append({"params": list(maps), "lr": adapter_lr * lr})
    try:
        optimise = optimizer(groups, lr=lr, weight_decay=weight_decay)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"optimizer must take lr and weight_decay, as torch.optim.Adam does: {reason(error)}"
        ) from error
    checks = DeferredChecks()  # read once, after the last step: what diverges stays so
    # autocast would keep what it casts, and train heads that the loss no longer sees
    with checks, torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        for _ in tqdm(range(steps), desc="Adapting", unit="step", leave=False, disable=embed is None):
            optimise.zero_grad()
            if embed is not None:
                features = embed()
                prototypes = class_prototypes(features, labels, prototypes.shape[-2])
            objective(features @ heads.image, prototypes @ heads.prototype, labels, temperature).sum().backward()
            optimise.step()
    checks.read()
    return Heads(*(head.detach() for head in heads))


def fit_episodes(
    features: Tensor, supports: Sequence[tuple[Any, Any]], batch_size: int = 8, progress: bool = True, **settings: Any
) -> list[Heads]:
    """[`fit_heads`] for many episodes over one set of cached features, `batch_size` of them at a time.

    Episodes of like size are trained together, so that little is spent on padding.

    Args:
        features: (M, d), of every image of the set.
        supports: for each episode the rows of its support images, and their labels 0, 1, ...
        settings: as [`fit_heads`] takes them.

    Returns:
        One pair of heads (d, d) for each episode, in their order.
    """
    order = sorted(range(len(supports)), key=lambda i: len(supports[i][0]))
    found: dict[int, Heads] = {}
    with tqdm(total=len(order), unit="episode", leave=False, disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows, labels = (
                pad_sequence([torch.as_tensor(supports[i][part]) for i in batch], True, padding)
                for part, padding in ((0, 0), (1, -1))
            )
            heads = fit_heads(features[rows], labels.to(features.device), **settings)
            found.update((i, Heads(*pair)) for i, *pair in zip(batch, *heads, strict=True))
            bar.update(len(batch))
    return [found[i] for i in range(len(supports))]
