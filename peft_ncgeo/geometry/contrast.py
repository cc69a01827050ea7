"""Contrastive losses between images and class prototypes, and the gap between both sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import check_float
from .checks import check_finite, check_labels, check_shape, check_tensor, maybe, numbers, refuse_unless
from .sphere import has_usual_lengths, l2_normalize, length_and_direction, modality_gap, scale_extreme_rows

TEMPERATURE = math.exp(-2)  # as in CoPA's code
URL_TEMPERATURE = 0.1


def prototype_image_contrast(
    instances: Tensor, prototypes: Tensor, labels: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the symmetric cross-entropy between samples and class prototypes, like CLIP's between images and texts.

    With unit rows `e_i` and `p_c`, `q_i = p_{y_i}` and logits `S = e q^T / temperature` (N, N), the value is
    `1/2 (CE(S, i) + CE(S^T, i))`, with target i for sample i. Samples of one class share a prototype, so the same
    number is computed from the logits `s = e p^T / temperature` (N, K) alone: with n_c samples in class c,

    `1/(2N) (sum_i log sum_c n_c e^{s_ic} + sum_c n_c log sum_i e^{s_ic} - 2 sum_i s_{i,y_i})`.

    The value is at least `mean_i log n_{y_i}`, since samples of one class share a target. Classes without samples are
    ignored. It takes O(NKd) time and O(N(K + d)) memory for each leading index.

    Args:
        instances: `(..., N, d)`; normalised here.
        prototypes: `(..., K, d)`, with the same leading shape (for example episodes); normalised here.
        labels: `(..., N)` int64 in 0..K-1, or -1 for padding; padded rows are ignored and may hold any values.
        temperature: 1e-6 to 1e6; the default e^-2 scales cosines by 7.4.

    Returns:
        `(...)`, one value for each leading index, in float32 or wider even under autocast; 0, attached to the graph,
        for an index without samples.

    Raises:
        ValueError: shapes do not fit, labels are not int64 in -1..K-1, or temperature is out of range.
        FloatingPointError: the value is not finite, because a sample or a prototype is not finite.

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
    """Return the mean cross-entropy of samples over class prototypes, `-log softmax_c(e_i . p_c / temperature)[y_i]`.

    At the default temperature of 0.1 this is the loss of URL. Other arguments, shapes and errors are those of
    [`prototype_image_contrast`]; classes without samples and padding are ignored too.

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
    """Return an upper bound of the gap between features and prototypes after one linear head.

    With `Delta = mean_i x_i - mean_c P_c` and Theta^j the head's columns:
    `||Delta Theta||_2 <= max_j |cos(Delta, Theta^j)| ||Theta||_F ||Delta||_2`, the right-hand side is returned.
    So a head shared by both sides can only scale an existing gap. The bound is 0 if Delta is 0, as it is (up to
    rounding) for class means over equal numbers of samples; a column of 0 has cosine 0.

    It does not bound the gap of normalised features, which [`modality_gap`] measures: that gap may be above 0 even if
    Delta is 0.

    Args:
        features: (N, d), before the head, N at least 1; not normalised here.
        prototypes: (K, d), before the head, K at least 1.
        head: Theta, (d, d_out); for an `nn.Linear` it is `weight.T`.

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
        _, columns, nonzero = length_and_direction(head.T)
        along = (columns * nonzero) @ delta  # cos(Delta, Theta^j) ||Delta||, without division by Delta, which may be 0
        bound = along.abs().max() * length_and_direction(head.flatten())[0].squeeze() * head.any()
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
    """Return [`prototype_image_contrast`] after shifts of images and prototypes along the gap between them.

    With unit rows and `g = mean_i e_i - mean_c p_c` over the classes that have samples, each t in `shifts` gives
    `e_i' = unit(e_i + t/2 g)` and `p_c' = unit(p_c - t/2 g)`. t = 0 changes nothing, t > 0 makes the gap larger, and
    t = -1 almost closes it (not exactly, since rows are scaled to length 1 again). If g is 0 up to rounding, no t has
    an effect.

    Args:
        instances: (N, d); normalised here.
        prototypes: (K, d); normalised here.
        labels: (N,) int64 in 0..K-1, or -1 for padding, which is ignored.
        shifts: T values of t.
        temperature: temperature of the loss, 1e-6 to 1e6.

    Returns:
        Gaps (T,) after the shift, in 0..2, as in [`modality_gap`]; and losses (T,). Both in float32 or wider.

    Raises:
        ValueError: as in [`prototype_image_contrast`]; or there is no sample, or shifts are not a row of finite
            numbers.

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
        raise ValueError(f"shifts must be a row of finite numbers, but shifts[{i}] is {float(steps[i])}.")
    kept = labels >= 0
    if not kept.any():
        raise ValueError("No sample has a label, so there is no gap to shift.")
    present, labels = labels[kept].unique(return_inverse=True)
    e, p = l2_normalize(instances[kept]), l2_normalize(prototypes[present])
    gap = e.mean(0) - p.mean(0)
    gaps, losses = [], []
    for t in steps.tolist():
        images, classes = e + t / 2 * gap, p - t / 2 * gap
        gaps.append(modality_gap(images, classes))
        losses.append(prototype_image_contrast(images, classes, labels, temperature))
    return torch.stack(gaps), torch.stack(losses)


def check_temperature(temperature: float) -> float:
    """Return the temperature as a float; raise an error if scaled cosines would overflow or become equal."""
    return check_float("temperature", temperature, "1e-6 to 1e6", lambda number: 1e-6 <= number <= 1e6)


def _scores(
    instances: Tensor, prototypes: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cosines over the temperature in float32 or wider, with three tensors made from the labels.

    Returns:
        Scores (..., N, K); the class of each sample, 0 for padding (..., N); 1 for samples and 0 for padding (..., N);
        the number of samples of each class (..., K). Scores of padding and of classes without samples are finite, but
        have no meaning.
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
    # divide the products (N, K) by lengths, which is faster than scaling the features (N, d)
    # rows of 0 stay 0, as in `l2_normalize`
    lengths = torch.linalg.vector_norm(instances, dim=-1, keepdim=True).clamp_min(1e-12)
    if not has_usual_lengths(lengths.detach().masked_fill(~kept[..., None], 1)):
        instances = scale_extreme_rows(instances)
        lengths = torch.linalg.vector_norm(instances, dim=-1, keepdim=True).clamp_min(1e-12)
    return instances @ l2_normalize(prototypes).mT / lengths / temperature, index, samples, counts


def _finite(value: Tensor) -> Tensor:
    message = "The contrast is not finite: instances or prototypes hold nan or inf."
    refuse_unless(value.detach().isfinite().all(), FloatingPointError, message)
    return value


def _nothing(scores: Tensor) -> float:
    """Return a score that a softmax ignores; it is not -inf, as a softmax over such scores alone must be finite."""
    return torch.finfo(scores.dtype).min / 4


def _check(instances: Tensor, prototypes: Tensor, labels: Tensor) -> bool:
    """Return True if there may be padding; raise a ValueError for wrong shapes and labels."""
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
