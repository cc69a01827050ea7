"""Contrast between images and class prototypes, and the gap between the two sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import real_number
from .checks import check_finite, check_labels, check_shape, check_tensor, maybe, numbers, refuse_unless
from .sphere import modality_gap, moderate, ordinary, polar, unit

TEMPERATURE = math.exp(-2)  # of CoPA's code
URL_TEMPERATURE = 0.1


def prototype_image_contrast(
    instances: Tensor, prototypes: Tensor, labels: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Symmetric cross-entropy between each sample and the prototype of its class, as CLIP's between image and text.

    With unit rows `e_i` and `p_c`, `q_i = p_{y_i}` and logits `S = e q^T / temperature` (N, N), it is
    `1/2 (CE(S, i) + CE(S^T, i))`, sample i being its own target. Samples of one class share a prototype, so only the
    logits `s = e p^T / temperature` (N, K) are formed: with n_c samples in class c,

    `1/(2N) (sum_i log sum_c n_c e^{s_ic} + sum_c n_c log sum_i e^{s_ic} - 2 sum_i s_{i,y_i})`,

    the same number. Never below `mean_i log n_{y_i}`, which samples of one class do not tell apart. Classes without
    samples drop out, whatever their prototype. O(NKd) time and O(N(K + d)) memory an index.

    Args:
        instances: `(..., N, d)`; normalised here.
        prototypes: `(..., K, d)`, of the same leading shape, episodes for instance; normalised here.
        labels: `(..., N)` int64 in 0..K-1, or -1: padding, which counts for nothing and whose rows may be anything.
        temperature: 1e-6 to 1e6; the default e^-2 scales cosines by 7.4.

    Returns:
        `(...)`, one value for each leading index, in float32 or wider whatever autocast says; 0, attached to the
        graph, for an index without samples.

    Raises:
        ValueError: shapes do not fit, labels are not int64 in -1..K-1, or temperature is out of range.
        FloatingPointError: the value is not finite, since a sample or the prototype of its class is not.

    Reference: H. Tian et al., Mind the Gap Between Prototypes and Images in Cross-domain Finetuning, NeurIPS 2024,
    arXiv 2410.12474.
    """
    check_tensor("instances", instances)
    with torch.autocast(instances.device.type, enabled=False):
        s, index, samples, counts = _scores(instances, prototypes, labels, temperature)
        nothing = _nothing(s)
        if maybe(~samples.all()):
            s = s.masked_fill((samples == 0)[..., None], nothing)
        rows = (s + counts.log().clamp_min(nothing)[..., None, :]).logsumexp(-1)
        columns = s.logsumexp(-2).clamp_min(nothing)  # N = 0 gives -inf
        own = s.gather(-1, index[..., None]).squeeze(-1)
        value = (samples * (rows - 2 * own)).sum(-1) + (counts * columns).sum(-1)
        return _finite(value / (2 * samples.sum(-1).clamp_min(1)))


def prototype_cross_entropy(
    instances: Tensor, prototypes: Tensor, labels: Tensor, temperature: float = URL_TEMPERATURE
) -> Tensor:
    """Cross-entropy of samples over class prototypes by cosine, `-log softmax_c(e_i . p_c / temperature)[y_i]`.

    The loss that URL minimises, with a temperature of 0.1. Its mean over the samples; classes without samples and
    padding drop out as in [`prototype_image_contrast`], whose arguments, shapes and errors it has.

    Reference: W.-H. Li, X. Liu, H. Bilen, Universal Representation Learning from Multiple Domains for Few-shot
    Classification, ICCV 2021, arXiv 2103.13841.
    """
    check_tensor("instances", instances)
    with torch.autocast(instances.device.type, enabled=False):
        s, index, samples, counts = _scores(instances, prototypes, labels, temperature)
        s = s.masked_fill((counts == 0)[..., None, :], _nothing(s))
        value = s.logsumexp(-1) - s.gather(-1, index[..., None]).squeeze(-1)
        return _finite((samples * value).sum(-1) / samples.sum(-1).clamp_min(1))


def shared_head_gap_bound(features: Tensor, prototypes: Tensor, head: Tensor) -> Tensor:
    """Upper bound of the gap that one linear head leaves between features and prototypes, before normalisation.

    With `Delta = mean_i x_i - mean_c P_c` and Theta^j the head's columns:
    `||Delta Theta||_2 <= max_j |cos(Delta, Theta^j)| ||Theta||_F ||Delta||_2`, the right-hand side. A head shared by
    both sides can thus only scale what gap there is. 0 where Delta is 0, as it is to rounding for class means of
    equally many samples; a column of 0 has cosine 0.

    It does not bound the gap of normalised features, which is what [`modality_gap`] measures: Delta may be 0 and
    that gap not.

    Args:
        features: (N, d), before the head, N at least 1; taken as they are.
        prototypes: (K, d), before the head, K at least 1.
        head: Theta, (d, d_out); an `nn.Linear`'s is its `weight.T`.

    Returns:
        A scalar in float32 or wider, in the units of the features times those of the head.

    Raises:
        ValueError: shapes do not fit, values are not finite, or the bound is too large for a float.

    Reference: H. Tian et al., NeurIPS 2024, arXiv 2410.12474, the poster.
    """
    for name, tensor in (("features", features), ("prototypes", prototypes), ("head", head)):
        check_tensor(name, tensor)
        check_finite(name, tensor)
    if features.dim() != 2 or prototypes.dim() != 2 or features.shape[1:] != prototypes.shape[1:]:
        raise ValueError(
            f"features and prototypes must have shapes (N, d) and (K, d), got {tuple(features.shape)} and "
            f"{tuple(prototypes.shape)}."
        )
    if not len(features) or not len(prototypes):
        raise ValueError(f"features and prototypes need a row each, got {len(features)} and {len(prototypes)}.")
    if head.dim() != 2 or len(head) != features.shape[1] or not head.shape[1]:
        raise ValueError(f"head must have shape ({features.shape[1]}, d_out), got {tuple(head.shape)}.")
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(features.dtype, prototypes.dtype), torch.float32)
        dtype = torch.promote_types(dtype, head.dtype)
        delta = features.to(dtype).mean(0) - prototypes.to(dtype).mean(0)
        head = head.to(dtype)
        _, columns, nonzero = polar(head.T)
        along = (columns * nonzero) @ delta  # cos(Delta, Theta^j) ||Delta||, with no division by a Delta of 0
        bound = along.abs().max() * polar(head.flatten())[0].squeeze() * head.any()
    refuse_unless(
        bound.isfinite(), ValueError, "The bound is too large for {}; scale the features or the head.", dtype
    )
    return bound


def loss_against_gap(
    instances: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    shifts: Sequence[float] | Tensor,
    temperature: float = TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """[`prototype_image_contrast`] as images and prototypes are moved apart or together along the gap between them.

    With unit rows and `g = mean_i e_i - mean_c p_c` over the classes that have samples, for every t in `shifts`
    `e_i' = unit(e_i + t/2 g)` and `p_c' = unit(p_c - t/2 g)`. t = 0 leaves both as they are, t > 0 enlarges the gap,
    t = -1 about closes it (exactly, were rows not scaled to length 1 again). Where g is 0 to rounding no t does
    anything.

    Args:
        instances: (N, d); normalised here.
        prototypes: (K, d); normalised here.
        labels: (N,) int64 in 0..K-1, or -1: padding, which is left out.
        shifts: t, T numbers.
        temperature: that of the loss, 1e-6 to 1e6.

    Returns:
        Gaps (T,), measured after the shift, as [`modality_gap`] has them: in 0..2; and losses (T,). Both in float32 or
        wider.

    Raises:
        ValueError: as [`prototype_image_contrast`] does; no sample; shifts are not a row of finite numbers.

    Reference: W. Liang et al., Mind the Gap, NeurIPS 2022, arXiv 2203.02053, for texts; H. Tian et al., NeurIPS 2024,
    arXiv 2410.12474, for prototypes.
    """
    check_shape("instances", instances, "N", "d")
    check_temperature(temperature)
    _check(instances, prototypes, labels)
    steps = numbers("shifts", shifts).detach().to("cpu", torch.float64)
    if steps.dim() != 1 or not len(steps):
        raise ValueError(f"shifts must be a row of finite numbers, got shape {tuple(steps.shape)}.")
    wrong = (~steps.isfinite()).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"shifts must be a row of finite numbers, shifts[{i}] is {float(steps[i])}.")
    kept = labels >= 0
    if not kept.any():
        raise ValueError("No sample has a label, so there is no gap to shift.")
    present, labels = labels[kept].unique(return_inverse=True)
    e, p = unit(instances[kept]), unit(prototypes[present])
    gap = e.mean(0) - p.mean(0)
    gaps, losses = [], []
    for t in steps.tolist():
        images, classes = e + t / 2 * gap, p - t / 2 * gap
        gaps.append(modality_gap(images, classes))
        losses.append(prototype_image_contrast(images, classes, labels, temperature))
    return torch.stack(gaps), torch.stack(losses)


def check_temperature(temperature: float) -> float:
    """Return the temperature as Python's number; refuse one for which cosines over it overflow or are all the same."""
    return real_number("temperature", temperature, "1e-6 to 1e6", lambda number: 1e-6 <= number <= 1e6)


def _scores(
    instances: Tensor, prototypes: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosines over the temperature (..., N, K) in float32 or wider, with all that is told by the labels.

    Returns:
        Scores; for every sample its class, 0 for padding (..., N); 1 for samples and 0 for padding (..., N); samples
        of each class (..., K). Scores of padding and of classes without samples are finite and mean nothing.
    """
    check_temperature(temperature)
    padded = _check(instances, prototypes, labels)
    dtype = torch.promote_types(torch.promote_types(instances.dtype, prototypes.dtype), torch.float32)
    kept = labels >= 0
    samples = kept.to(dtype)
    index = labels.clamp(0, prototypes.shape[-2] - 1) if padded else labels
    counts = samples.new_zeros(prototypes.shape[:-1]).scatter_add_(-1, index, samples)
    if padded and maybe(~instances.detach().sum().isfinite()):
        instances = instances.masked_fill(~kept[..., None], 1)  # 0 * nan is nan in a backward pass
    prototypes = prototypes.masked_fill((counts == 0)[..., None], 1).to(dtype)
    instances = instances.to(dtype)
    # products (N, K) are divided by lengths, since scaling the features (N, d) takes longer
    lengths = torch.linalg.vector_norm(instances, dim=-1, keepdim=True).clamp_min(1e-12)  # as `unit` treats a row of 0
    if not ordinary(lengths.detach().masked_fill(~kept[..., None], 1)):
        instances = moderate(instances)
        lengths = torch.linalg.vector_norm(instances, dim=-1, keepdim=True).clamp_min(1e-12)
    return instances @ unit(prototypes).mT / lengths / temperature, index, samples, counts


def _finite(value: Tensor) -> Tensor:
    message = "The contrast is not finite: instances or prototypes hold nan or inf."
    refuse_unless(value.detach().isfinite().all(), FloatingPointError, message)
    return value


def _nothing(scores: Tensor) -> float:
    """A score that leaves nothing; not -inf: a softmax over nothing else is still finite, then times 0."""
    return torch.finfo(scores.dtype).min / 4


def _check(instances: Tensor, prototypes: Tensor, labels: Tensor) -> bool:
    """Whether there may be padding; ValueErrors for shapes that do not fit and labels that are none."""
    for name, tensor in (("instances", instances), ("prototypes", prototypes), ("labels", labels)):
        check_tensor(name, tensor)
    if instances.dim() < 2 or instances.dim() != prototypes.dim() or instances.shape[:-2] != prototypes.shape[:-2]:
        raise ValueError(
            f"instances and prototypes must have shapes (..., N, d) and (..., K, d), got {tuple(instances.shape)} and "
            f"{tuple(prototypes.shape)}."
        )
    classes, dim = prototypes.shape[-2:]
    if dim != instances.shape[-1] or not classes or not dim:
        raise ValueError(
            f"prototypes must have shape (..., K, {instances.shape[-1]}) with K >= 1, got {tuple(prototypes.shape)}."
        )
    if labels.shape != instances.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape {tuple(instances.shape[:-1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    check_labels(labels, classes, lowest=-1)
    return maybe((labels < 0).any())
