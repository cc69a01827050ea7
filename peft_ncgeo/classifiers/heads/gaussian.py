"""Class means and a shared shrunk precision of features, with leave-one-out scores in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry.heads import class_prototypes

_CHUNK = 256  # images that are left out at once


def shrunk_precision(scatter: Tensor, count: int) -> Tensor:
    """Return `P = d (S + tr(S) / (n - 1) I)^-1` of the scatter S (d, d) of n features.

    It is the precision of the covariance `Sigma = S / (n - 1)` as `d ((n - 1) Sigma + tr(Sigma) I)^-1`.

    Raises:
        ValueError: n is 1, or the scatter is 0.
    """
    d = len(scatter)
    shrinkage = float(scatter.trace()) / max(1, count - 1)
    if count < 2 or not shrinkage > 1e-12:
        raise ValueError(
            "The support features of a class do not spread (all are equal), so they have no covariance; pass more "
            "images, or a larger num_views."
        )
    return d * torch.linalg.inv(scatter + shrinkage * torch.eye(d, dtype=scatter.dtype))


class GaussianFit:
    """Class means (K, d) and the scatter (d, d) around them of unit features (V, N, d), in float64."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        self.features, self.labels = features, labels
        self.samples, self.sample_labels = features.flatten(0, 1), labels.repeat(len(features))
        self.means = class_prototypes(self.samples, self.sample_labels, classes)
        self.centred = self.samples - self.means[self.sample_labels]
        self.scatter = self.centred.T @ self.centred

    def precision(self) -> Tensor:
        """Return the shrunk precision (d, d), see [`shrunk_precision`]."""
        return shrunk_precision(self.scatter, len(self.samples))

    def inverse_of_mean_covariance(self) -> Tensor:
        """Return the pseudo-inverse (d, d) of the mean of the classes' covariances.

        Raises:
            ValueError: a class has only one feature.
        """
        counts = torch.bincount(self.sample_labels)
        if counts.min() < 2:
            raise ValueError(
                "A class with one support feature has no covariance; pass more images or a larger num_views, or omit "
                "published_precisions."
            )
        weighted = self.centred / (counts - 1)[self.sample_labels, None]
        return torch.linalg.pinv(weighted.T @ self.centred / len(counts), hermitian=True)

    def leave_one_out(self, images: Tensor) -> Tensor:
        """Return `x . P mu_c - mu_c . P mu_c / 2` (M, K) of the first view x of images, fitted without the image.

        Without the V views of an image of class y, the scatter loses `U'U`, with the V rows `x_v - mu_y` and one
        along the shift of the mean. In the eigenvectors of S the rest, `S + t I - U'U`, has a closed inverse
        (Woodbury) although t changes too.

        Args:
            images: (M,), indices of images whose class has another image.
        """
        values, vectors = torch.linalg.eigh(self.scatter)
        features, means = self.features.transpose(0, 1) @ vectors, self.means @ vectors
        parts = [self._without(part, values.clamp_min(0), features, means) for part in images.split(_CHUNK)]
        return torch.cat([means.new_zeros(0, len(means)), *parts])

    def _without(self, images: Tensor, values: Tensor, features: Tensor, means: Tensor) -> Tensor:
        """Return the scores of some images; all vectors are in the basis of the eigenvectors of S."""
        views, d = features.shape[1:]
        left, labels, place = features[images], self.labels[images], torch.arange(len(images))
        rest = (torch.bincount(self.sample_labels)[labels, None] - views).double()
        apart = left - means[labels][:, None]
        shift = -apart.sum(1) / rest
        u = torch.cat([apart, (rest.sqrt() * shift)[:, None]], 1)  # (M, V + 1, d)
        count = len(self.samples) - views
        shrinkage = (values.sum() - u.square().sum((1, 2))).clamp_min(0) / max(1, count - 1)
        inverse = 1 / (values + shrinkage[:, None]).clamp_min(1e-12)  # (M, d)
        scaled = u * inverse[:, None]
        factor = torch.linalg.cholesky(torch.eye(views + 1, dtype=u.dtype) - scaled @ u.mT)
        query = left[:, 0]
        # m . P q = d (m . D q + (L^-1 G m) . (L^-1 G q)), with D the inverse and G = U D
        mine = means[labels] + shift
        lower_query = torch.linalg.solve_triangular(factor, scaled @ query[..., None], upper=False)
        lower_means = torch.linalg.solve_triangular(factor, scaled @ means.T, upper=False)  # (M, V + 1, K)
        lower_mine = torch.linalg.solve_triangular(factor, scaled @ mine[..., None], upper=False)
        linear = (inverse * query) @ means.T + (lower_means * lower_query).sum(1)
        square = inverse @ means.square().T + lower_means.square().sum(1)
        linear[place, labels] = (inverse * query * mine).sum(-1) + (lower_mine * lower_query).sum((1, 2))
        square[place, labels] = (inverse * mine.square()).sum(-1) + lower_mine.square().sum((1, 2))
        return d * (linear - square / 2)
