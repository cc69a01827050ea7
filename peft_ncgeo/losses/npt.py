"""Loss terms of NPT (both published versions): text and image features move towards simplex ETFs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry.pairs import most_alike
from ..geometry.simplex import (
    centred_directions,
    etf_deviation,
    etf_floor,
    gram_distance,
    simplex_distance,
)
from ..geometry.sphere import l2_normalize
from ..geometry.transport import check_solver, grouped_transport_plans
from .base import GeometryBatch, Regularizer, class_indices


class _TextSimplex(Regularizer):
    """Base of terms on class texts, with warnings about texts that training cannot separate."""

    _looked = False

    def _look(self, text: Tensor) -> None:
        if self._looked:
            return
        self._looked = True
        if len(text) < 2:
            return
        cosine, pair = most_alike(l2_normalize(text.detach()))
        if cosine > 1 - 1e-6:
            first, second = pair.tolist()
            warnings.warn(
                f"{self.name}: classes {first} and {second} have the same text features; equal texts get equal "
                "gradients and never separate.",
                stacklevel=3,
            )

    def _warn_of_floor(self, num_classes: int, dim: int) -> None:
        floor = etf_floor(num_classes, dim)
        if floor:
            warnings.warn(
                f"{self.name}: {num_classes} classes in {dim} dimensions cannot form a simplex ETF; by the Welch "
                f"bound the mean squared deviation stays above {floor:.4g}.",
                stacklevel=4,
            )


class LanguageCollapse(_TextSimplex):
    r"""NPT's language-modality collapse: class texts move towards a simplex ETF.

    .. math:: L = \frac{1}{K(K-1)} \sum_{i \ne j} \left(\hat g_i \cdot \hat g_j + \frac{1}{K-1}\right)^2

    | field | shape |
    |---|---|
    | text_features | (K, d) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 0.25 (our reading).

    Raises:
        ValueError: text_features is missing or not finite, or there are fewer than two classes.

    Warns: once, if K > d + 1, with the lower limit from the Welch bound, and if two texts are equal.

    Relations: [`ClusterCollapse`] is the same term within clusters.

    Reference: D. Zhu et al., Understanding Prompt Tuning for V-L Models Through the Lens of Neural Collapse, the later
    version of arXiv 2306.15955 (the formula is our reading).

    Example: `GeometryTrainer(..., losses=[LanguageCollapse(weight=0.25), ModalityIsomorphism(weight=0.15)])`
    """

    default_name = "language_collapse"
    requires = ("text_features",)
    reads_labels = False

    def forward(self, batch: GeometryBatch) -> Tensor:
        (text,) = batch.need("text_features")
        if not self._looked:
            self._warn_of_floor(*text.shape)
        self._look(text)
        return etf_deviation(text)


class GeometricDebiasing(_TextSimplex):
    r"""NPT's geometric de-biasing (first version): texts and images of the batch's classes form the same shape.

    .. math:: L = \left\| \frac{G_t}{\|G_t\|_F} - \frac{G_i}{\|G_i\|_F} \right\|_F

    `G_m` is the Gram matrix of modality m's class means over the `n_c` classes in the batch; the mean of these means
    is subtracted and the rows are normalised. With E the ETF's Gram matrix `n_c/(n_c-1) (I - 11^T/n_c)`, `anchor` adds
    `|| G_m/||G_m||_F - E/||E||_F ||_F` for both modalities m. With fewer than three classes in the batch, the loss is
    0, attached to the graph.

    | field | shape |
    |---|---|
    | image_features | (B, d) |
    | text_features | (K, d) |
    | labels | (B,) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 0.25 (our reading).
        anchor: True adds the distances from the ETF, see above.

    Raises:
        ValueError: a field is missing or not finite; the message names it.

    Warns: once, if two texts are equal.

    Reference: D. Zhu et al., arXiv 2306.15955v2. The pseudo-code compares eigenvectors, which are defined only up to
    rotation; the Gram matrix is invariant (our reading).

    Example: `GeometricDebiasing(weight=0.25)`
    """

    default_name = "debiasing"
    requires = ("text_features",)

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        anchor: bool = False,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        self.anchor = anchor

    def forward(self, batch: GeometryBatch) -> Tensor:
        image, text, labels = batch.need("image_features", "text_features", "labels")
        self._look(text)
        labels = class_indices(labels, len(text))
        image, text = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (image, text))
        if len(labels) < 3:
            return 0 * (image.sum() + text.sum())
        alike = labels[:, None] == labels
        present = alike.int().argmax(1) == torch.arange(len(labels), device=labels.device)  # one row per class
        means = alike.to(image) @ image / alike.sum(1, keepdim=True)
        points = [centred_directions(side, present) for side in (text[labels], means)]
        value = gram_distance(*points)
        if self.anchor:
            value = value + sum(simplex_distance(side @ side.T, present) for side in points)
        return value.where(present.sum() > 2, 0)  # two centred points always have the same shape


class ModalityIsomorphism(Regularizer):
    r"""NPT's multi-modal isomorphism: images move towards the text of their class.

    .. math:: L = \frac{1}{|S|} \sum_{c \in S} \frac{1}{n_c} \sum_{i: y_i = c} \|\hat f_i - \hat g_c\|^2

    over the classes S in the batch (method "mean", the later version of the paper; CPT's class-centre term is the
    same). Method "sinkhorn", the first version, replaces the inner mean by `W_eps(texts of c, images of c) = <P_eps,
    C>`: P_eps is the entropic plan between the class's templates and its images, with uniform marginals, and C are
    their squared distances. With one text for each class, only one plan is possible, and both methods give the same
    value.

    | field | shape |
    |---|---|
    | image_features | (B, d) |
    | text_features | (K, d), for "mean" |
    | template_features | (K, T, d), for "sinkhorn": the student's texts in `student_templates` |
    | labels | (B,) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 0.15 (our reading).
        method: "mean" or "sinkhorn".
        epsilon: strength of the entropy relative to a class's mean cost, for "sinkhorn" only. Default 0.1.

    Raises:
        ValueError: the method is unknown, epsilon is given with "mean" or too small, or a field is missing or not
            finite; the message names it.

    Reference: D. Zhu et al., arXiv 2306.15955.

    Example: `ModalityIsomorphism(weight=0.15, method="sinkhorn")`
    """

    default_name = "isomorphism"

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        method: str = "mean",
        epsilon: float | None = None,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        if method not in ("mean", "sinkhorn"):
            raise ValueError(f"method={method!r} must be 'mean' or 'sinkhorn'.")
        check_solver("exact" if method == "mean" else "entropic", epsilon)
        self.method, self.epsilon = method, epsilon
        self.requires = ("text_features",) if method == "mean" else ("template_features",)

    def forward(self, batch: GeometryBatch) -> Tensor:
        image, labels, text = batch.need("image_features", "labels", *self.requires)
        labels = class_indices(labels, len(text))
        image = l2_normalize(image)
        if self.method == "sinkhorn":
            return self._transported(image, l2_normalize(text).to(image), labels)
        squares = (image - l2_normalize(text)[labels]).square().sum(-1)
        per_class, counts = _class_means(squares[:, None], labels, len(text))
        return per_class.sum() / (counts > 0).sum()

    def _transported(self, image: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        # squared distances of unit vectors, without their differences (B, T, d)
        cost = (2 - 2 * torch.einsum("btd,bd->bt", texts[labels], image)).clamp_min(0)
        plans, classes = grouped_transport_plans(cost, labels, self.epsilon)
        return (plans * cost).sum() / classes


def _class_means(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean (K, d) of the rows (B, d) of each class, 0 for empty classes, and the numbers of rows (K,)."""
    counts = torch.zeros(num_classes, dtype=values.dtype, device=values.device)
    counts = counts.index_add(0, labels, torch.ones_like(labels, dtype=values.dtype))
    sums = values.new_zeros(num_classes, values.shape[1]).index_add(0, labels, values)
    return sums / counts.clamp_min(1)[:, None], counts
