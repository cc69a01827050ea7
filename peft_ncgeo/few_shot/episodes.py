"""Training of heads for images and prototypes on cached features: one episode, or many in one batch."""

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
from ..validation import check_int, check_non_negative, one_line, short_repr

Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ADAPTER_LR = 0.1  # share of the heads' learning rate, for TSA's maps beside CoPA's heads


def head_settings(config: CoPAConfig) -> dict[str, Any]:
    """Return the arguments of [`fit_heads`] for a config: CoPA's loss, or URL's for a shared head."""
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
    """Train heads on support features, starting from the identity.

    With a leading dimension E, each entry is an episode of its own. Their losses are summed, and the optimiser
    updates each number independently, so training them together gives the same results as one by one, up to rounding.

    Args:
        features: (N, d) or (E, N, d), from the frozen backbone; used in float32 or wider, also under autocast.
        labels: (N,) or (E, N), the episode's classes as 0, 1, ...; -1 marks padding.
        steps, lr, weight_decay: settings of the optimiser; weight decay is added to the gradient, as in torch's Adam.
        shared: use one head for images and prototypes.
        temperature: tau, the divisor of the cosines.
        objective: loss of instances (..., N, d), prototypes (..., K, d), labels and temperature.
        optimizer: any torch optimiser that updates each number independently, and steps without a closure.
        embed: function that computes the features again, with gradients, if `maps` in the backbone are trained too.
        maps: parameters trained beside the heads, with `adapter_lr` times the heads' learning rate.

    Raises:
        TypeError: a value that is not a number, or an optimizer that does not take lr and weight_decay.
        ValueError: features that are not finite, shapes that do not fit, a value out of range.
        FloatingPointError: the loss is not finite in one of the steps.
    """
    if features.dim() not in (2, 3) or features.shape[:-1] != labels.shape:
        raise ValueError(
            f"features must be (N, d) or (E, N, d) with one label for each row, got {tuple(features.shape)} and "
            f"labels {tuple(labels.shape)}."
        )
    steps = check_int("steps", steps, least=0)
    lr, weight_decay, adapter_lr = (
        check_non_negative(name, value)
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("adapter_lr", adapter_lr))
    )
    if not callable(optimizer):
        raise TypeError(
            f"optimizer must be an optimizer class of torch, such as torch.optim.Adam, got {short_repr(optimizer)}."
        )
    finite = features.isfinite().all(-1) | (labels < 0)
    if not finite.all():
        raise ValueError(
            f"The features of support image {(~finite).nonzero()[0].tolist()[-1]} are not finite; check that image "
            "and the backbone."
        )
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    features = features.masked_fill((labels < 0)[..., None], 0)  # padding must stay 0 when multiplied by a weight of 0
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
            f"optimizer must take lr and weight_decay, as torch.optim.Adam does: {one_line(error)}"
        ) from error
    checks = DeferredChecks()  # read once, after the last step: a diverged loss does not recover
    # autocast would cache cast heads, and later steps would train heads that the loss does not use
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
    """Train heads for many episodes over one set of cached features, `batch_size` episodes at a time.

    Each episode gets the heads that [`fit_heads`] returns for it. Episodes of similar size are trained together, to
    save padding.

    Args:
        features: (M, d), one row for each image in the set.
        supports: for each episode the rows of its support images, and their labels 0, 1, ...
        settings: arguments of [`fit_heads`].

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
