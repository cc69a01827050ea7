"""Terms that pull text and image features towards simplex ETFs: NPT (both published versions) and CPT."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry.simplex import (
    centred_directions,
    etf_deviation,
    etf_floor,
    gram_distance,
    simplex_distance,
)
from ..geometry.sphere import unit
from ..geometry.transport import check_solver, grouped_transport_plans
from .base import GeometryBatch, Regularizer, class_indices


class _TextSimplex(Regularizer):
    """A term on class texts, which warns once of what no gradient can mend."""

    _looked = False

    def _look(self, text: Tensor) -> None:
        if self._looked:
            return
        self._looked = True
        points = unit(text.detach())
        cosines = (points @ points.T).fill_diagonal_(-1)
        if len(cosines) > 1 and cosines.max() > 1 - 1e-6:
            first, second = divmod(int(cosines.argmax()), len(cosines))
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
    r"""NPT's language-modality collapse: class texts move towards one simplex ETF.

    .. math:: L = \frac{1}{K(K-1)} \sum_{i \ne j} \left(\hat g_i \cdot \hat g_j + \frac{1}{K-1}\right)^2

    | field | shape |
    |---|---|
    | text_features | (K, d) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. Weight 0.25 (our reading).

    Raises:
        ValueError: text_features missing or not finite.

    Warns: once, where K > d + 1, with the floor that the Welch bound sets, and where two texts are equal.

    Relations: [`ClusterCollapse`] asks the same within clusters only.

    Reference: D. Zhu et al., Understanding Prompt Tuning for V-L Models Through the Lens of Neural Collapse, the later
    version of arXiv 2306.15955 (the formula is our reading).

    Example: `GeometryTrainer(..., losses=[LanguageCollapse(weight=0.25), ModalityIsomorphism(weight=0.15)])`
    """

    default_name = "language_collapse"
    requires = ("text_features",)

    def forward(self, batch: GeometryBatch) -> Tensor:
        (text,) = batch.need("text_features")
        if not self._looked:
            self._warn_of_floor(*text.shape)
        self._look(text)
        return etf_deviation(text)


class GeometricDebiasing(_TextSimplex):
    r"""NPT's geometric de-biasing (first version): texts and images of the batch's classes take the same shape.

    .. math:: L = \left\| \frac{G_t}{\|G_t\|_F} - \frac{G_i}{\|G_i\|_F} \right\|_F

    `G_m` is the Gram matrix of modality m's class means over the `n_c` classes in the batch, minus their mean, each
    row then normalised. With `anchor`, the distance of each to the ETF's Gram `n_c/(n_c-1) (I - 11^T/n_c)` is added.
    Fewer than three classes in the batch: 0, attached to the graph.

    | field | shape |
    |---|---|
    | image_features | (B, d) |
    | text_features | (K, d) |
    | labels | (B,) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. Weight 0.25 (our reading).
        anchor: see above.

    Raises:
        ValueError: a field missing or not finite, named.

    Reference: D. Zhu et al., arXiv 2306.15955v2. The pseudo-code compares eigenvectors, defined up to rotation only;
    the Gram form is the invariant one (our reading).

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
        present = alike.int().argmax(1) == torch.arange(len(labels), device=labels.device)  # one row a class
        means = alike.to(image) @ image / alike.sum(1, keepdim=True)
        points = [centred_directions(side, present) for side in (text[labels], means)]
        value = gram_distance(*points)
        if self.anchor:
            value = value + sum(simplex_distance(side @ side.T, present) for side in points)
        return value.where(present.sum() > 2, 0)  # two centred points always have the same shape


class ModalityIsomorphism(Regularizer):
    r"""NPT's multi-modal isomorphism: images move towards their class's text.

    .. math:: L = \frac{1}{|S|} \sum_{c \in S} \frac{1}{n_c} \sum_{i: y_i = c} \|\hat f_i - \hat g_c\|^2

    over the classes S in the batch (method "mean", the later version; CPT's class-centre term is the same). Method
    "sinkhorn", the first version, takes `W_eps(texts of c, images of c) = <P_eps, C>` in place of the inner mean: the
    entropic plan between the class's templates and its images, uniform marginals, squared distances. With one text a
    class the plan is forced and both agree.

    | field | shape |
    |---|---|
    | image_features | (B, d) |
    | text_features | (K, d), for "mean" |
    | template_features | (K, T, d), for "sinkhorn": the student's texts in `student_templates` |
    | labels | (B,) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. Weight 0.15 (our reading).
        method: "mean" or "sinkhorn".
        epsilon: strength of the entropy relative to a class's mean cost, for "sinkhorn" only. Default 0.1.

    Raises:
        ValueError: unknown method; epsilon with "mean" or too small; a field missing or not finite, named.

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
        image = unit(image)
        if self.method == "sinkhorn":
            return self._transported(image, unit(text).to(image), labels)
        squares = (image - unit(text)[labels]).square().sum(-1)
        per_class, counts = _class_means(squares[:, None], labels, len(text))
        return per_class.sum() / (counts > 0).sum()

    def _transported(self, image: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        # of unit vectors; their differences (B, T, d) would be formed once more
        cost = (2 - 2 * torch.einsum("btd,bd->bt", texts[labels], image)).clamp_min(0)
        plans, classes = grouped_transport_plans(cost, labels, self.epsilon)
        return (plans * cost).sum() / classes


def _class_means(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows (B, d) of each class, (K, d), zero for classes without; and how many rows each has, (K,)."""
    counts = torch.zeros(num_classes, dtype=values.dtype, device=values.device)
    counts = counts.index_add(0, labels, torch.ones_like(labels, dtype=values.dtype))
    sums = values.new_zeros(num_classes, values.shape[1]).index_add(0, labels, values)
    return sums / counts.clamp_min(1)[:, None], counts
