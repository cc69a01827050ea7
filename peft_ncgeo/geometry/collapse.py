"""Neural collapse of features and classifier: streaming class statistics, and NC1-NC4 computed from them."""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from ..validation import check_int
from .checks import check_tensor
from .pairs import block_rows, mean_cosine_deviation
from .simplex import fewer_rows, simplex_distance_of_product
from .sphere import scale_extreme_rows

CUT = 1e-10  # eigenvalues of the Gram matrix below this share of the largest count as rounding
ROUNDING = 1e-12  # differences shorter than this share of their operands count as rounding


class NeuralCollapse:
    """Streaming class statistics in float64, and the numbers NC1-NC4 computed from them.

    It keeps counts (K,), sums (K, d) and one second moment (d, d), on the device of the first features (for MPS, which
    has no float64, on the CPU). Memory is O(Kd + d^2) for any number of samples, also while [`compute`] runs. With
    `keep_samples` it also keeps the features, on the CPU in their own dtype, only for NC4.

    Args:
        num_classes: K; labels are 0..K-1.
        dim: d, the width of the features.
        keep_samples: keep every feature, so that [`compute`] can give NC4.

    Raises:
        ValueError: `num_classes` or `dim` is less than 1.

    Example:

    >>> from peft_ncgeo.geometry import simplex_etf
    >>> means, collapse = simplex_etf(num_classes=3, dim=2), NeuralCollapse(num_classes=3, dim=2)
    >>> for noise in (0.1, -0.1):
    ...     _ = collapse.update(means + noise, torch.tensor([0, 1, 2]))
    >>> numbers = collapse.all_reduce().compute(weights=means)
    >>> {name: round(numbers[name], 4) for name in ("nc1_trace", "nc2", "nc3", "nc4")}
    {'nc1_trace': 0.02, 'nc2': 0.0, 'nc3': 0.0, 'nc4': 1.0}

    Reference: V. Papyan, X. Y. Han, D. L. Donoho, Prevalence of neural collapse during the terminal phase of deep
    learning training, PNAS 2020.
    """

    def __init__(self, num_classes: int, dim: int, keep_samples: bool = True) -> None:
        num_classes, dim = check_int("num_classes", num_classes), check_int("dim", dim)
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes={num_classes} and dim={dim} must be at least 1.")
        self.num_classes, self.dim, self.keep_samples = num_classes, dim, keep_samples
        self._counts = torch.zeros(num_classes, dtype=torch.float64)
        # Sums and second moment are of x - origin, with the first batch's mean as origin: covariances are differences
        # of second moments, and a common offset of 1e4 would cost them 8 digits.
        self._origin = torch.zeros(dim, dtype=torch.float64)
        self._sums = torch.zeros(num_classes, dim, dtype=torch.float64)
        self._second = torch.zeros(dim, dim, dtype=torch.float64)
        self._samples: list[Tensor] = []
        self._reduced = False

    @property
    def counts(self) -> Tensor:
        """Number of samples of each class, (K,) integers."""
        return self._counts.long()

    @property
    def class_means(self) -> Tensor:
        """Mean feature of each class, (K, d) float64; a row is nan for a class without samples."""
        return self._sums / self._counts[:, None] + self._origin

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> NeuralCollapse:
        """Add a batch, without gradient; an empty batch changes nothing.

        Args:
            features: (B, d) in any floating dtype.
            labels: (B,) integers in 0..K-1.

        Returns:
            Itself.

        Raises:
            ValueError: a shape is wrong, labels are not integers in 0..K-1, or features or their squares are not
                finite. Nothing is added in this case.
            RuntimeError: [`all_reduce`] was called before.
        """
        self._check_local("update")
        check_tensor("features", features)
        check_tensor("labels", labels)
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (B, {self.dim}), got {tuple(features.shape)}.")
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be {features.shape[0]} integers, one per row of features, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        if not len(labels):
            return self
        device = self._counts.device
        if self._is_empty():
            device = torch.device("cpu") if features.device.type == "mps" else features.device
        labels, x = labels.to(device).long(), features.to(device).double()
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(f"labels must be in 0..{self.num_classes - 1}, got {int(outside[0])}.")
        wrong = (~x.isfinite().all(1)).nonzero().flatten()
        if len(wrong):
            raise ValueError(f"features has non-finite entries in {len(wrong)} rows, first in row {int(wrong[0])}.")
        origin = x.mean(0) if self._is_empty() else self._origin
        x = x - origin
        second = x.T @ x
        if not second.isfinite().all():
            raise ValueError("features differ too much for float64 to hold their squares; scale them.")
        if self._is_empty():
            self._counts, self._sums, self._second = (
                state.to(device) for state in (self._counts, self._sums, self._second)
            )
            self._origin = origin
        self._counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self._sums.index_add_(0, labels, x)
        self._second += second
        if self.keep_samples:
            self._samples.append(features.detach().to("cpu", copy=True))
        return self

    def all_reduce(self) -> NeuralCollapse:
        """Add up the statistics of all processes, once; every process must call it. Do nothing with a single process.

        This takes one all-reduce of `K + Kd + d^2` numbers, after one of d + 1 numbers that gives a common origin.
        Kept samples stay on their process. Afterwards every process has the same statistics, and [`update`] raises an
        error.

        Returns:
            Itself.

        Raises:
            RuntimeError: it was called before.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        self._check_local("all_reduce")
        count = self._counts.sum()
        total = _sum_over_processes(torch.cat([self._sums.sum(0) + count * self._origin, count[None]]))
        origin = total[:-1] / total[-1].clamp_min(1)  # the mean of all samples
        sums, second = self._about(origin)
        flat = _sum_over_processes(torch.cat([self._counts, sums.flatten(), second.flatten()]))
        counts, sums, second = flat.split([self._counts.numel(), sums.numel(), second.numel()])
        self._counts, self._origin = counts, origin
        self._sums, self._second = sums.view_as(self._sums), second.view_as(self._second)
        self._reduced = True
        return self

    @torch.no_grad()
    def compute(
        self, weights: Tensor | None = None, bias: Tensor | None = None, center_weights: bool = True
    ) -> dict[str, float]:
        """Return the numbers NC1-NC4 over the K' classes with samples.

        mu_c is the mean of class c, mu_G the mean of these means (not of the samples), M (K', d) the rows
        `mu_c - mu_G`, `G = M M^T`, `S_B = M^T M / K'`, and `S_W = 1/N sum_i (x_i - mu_{y_i})(x_i - mu_{y_i})^T`.

        - `nc1`: `tr(S_B^+ S_W) / K'`.
        - `nc1_trace`: `tr(S_W) / tr(S_B)`.
        - `nc2`: [`simplex_distance`] of G.
        - `nc2_norm_spread`: standard deviation of the lengths of M's rows (of the population: the sum is divided by
          K') over their mean.
        - `nc2_cosine`: mean over pairs of classes of `|cos(M_c, M_c') + 1/(K'-1)|`.

        With weights (W holds the rows of the K' classes minus their mean):

        - `nc3`: [`simplex_distance`] of `W M^T`.
        - `nc3_cosine`: mean over classes of `cos(W_c, M_c)`.
        - `nc4`, if samples were kept: share of the samples x for which `argmax_c (<x, weights_c> + bias_c)`, over all
          K classes, is the class whose mean mu_c is nearest to x. After [`all_reduce`] it is a share of the samples of
          all processes, and every process must call this method.

        All numbers are nan if fewer than two classes have samples or all class means are equal. Otherwise
        `nc2_cosine` and `nc3_cosine` are nan if a class mean equals mu_G, `nc3_cosine` if a row of W is 0, and `nc3`
        if `W M^T` is 0, as for a head of zeros. Both cases give one warning.

        Args:
            weights: (K, d), the classifier's rows, or text features.
            bias: (K,); only `nc4` uses it.
            center_weights: False: do not subtract the mean from W.

        Raises:
            ValueError: weights or bias have the wrong shape or non-finite entries, there is a bias without weights, or
                class means differ so little that the squares underflow in float64.
        """
        weights = self._check_classifier("weights", weights, (self.num_classes, self.dim))
        bias = self._check_classifier("bias", bias, (self.num_classes,))
        if weights is None and bias is not None:
            raise ValueError("bias was given without weights; pass weights too.")
        names = ["nc1", "nc1_trace", "nc2", "nc2_norm_spread", "nc2_cosine"]
        names += ["nc3", "nc3_cosine"] if weights is not None else []
        names += ["nc4"] if weights is not None and self.keep_samples else []

        present = self._counts > 0
        counts, sums = self._counts[present], self._sums[present]
        k, n = len(counts), counts.sum()
        means = sums / counts[:, None]
        if k and 0 < (means - means.mean(0)).abs().max() < 1e-140:
            raise ValueError("class means differ too little for float64 to hold the squares; scale the features up.")
        centered = _centered(means, (self._second.trace() / n).sqrt())
        if k < 2 or not centered.any():
            why = f"{k} classes have samples" if k < 2 else "all class means are equal"
            warnings.warn(f"Neural collapse is undefined, every value is nan: {why}.", stacklevel=3)
            return dict.fromkeys(names, math.nan)

        lengths = centered.norm(dim=1)
        directions = centered / lengths[:, None]
        within = (self._second - sums.T @ means) / n
        # S_B^+ = K' Z^T Z, Z = L^-1 U^T R for R R^T = U L U^T and M = Q R: of two sizes, this decomposes the smaller
        rows = fewer_rows(centered)
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        kept = values > CUT * values[-1]
        z = (vectors[:, kept].T @ rows) / values[kept, None]
        results = [
            ((z @ within) * z).sum().clamp_min(0),
            within.trace().clamp_min(0) / (centered.square().sum() / k),
            simplex_distance_of_product(centered, centered),
            lengths.std(correction=0) / lengths.mean(),
            mean_cosine_deviation(directions),
        ]
        if weights is not None:
            w = weights[present]
            w = scale_extreme_rows(w.flatten()).view_as(w)
            if center_weights:
                w = _centered(w, w.norm(dim=1).max())
            cosines = (w * directions).sum(1) / w.norm(dim=1)
            related = (w @ rows.T).any()  # as W M^T is 0 or not
            nc3 = simplex_distance_of_product(w, centered) if related else w.new_tensor(math.nan)
            results += [nc3, cosines.mean()]
            if self.keep_samples:
                results.append(self._agreement(weights, bias, means, present))
        numbers = dict(zip(names, map(float, results), strict=True))
        undefined = [name for name, value in numbers.items() if math.isnan(value)]
        if undefined:
            which = ", ".join(undefined)
            warnings.warn(f"{which} undefined (nan): a centred class mean or weight is a zero vector.", stacklevel=3)
        return numbers

    def _agreement(self, weights: Tensor, bias: Tensor | None, means: Tensor, present: Tensor) -> Tensor:
        """Return the share of all kept samples for which the classifier predicts the class of the nearest mean."""
        classes = present.nonzero().flatten()
        tally = torch.zeros(2, dtype=torch.float64, device=means.device)
        for samples in self._samples:
            for chunk in samples.split(block_rows(len(weights))):  # bounds the memory of the (N, K) scores
                x = chunk.to(means.device).double()
                scores = x @ weights.T if bias is None else x @ weights.T + bias
                # means are relative to the origin; ||x - mu||^2 = ||x||^2 - 2 (<x, mu> - ||mu||^2 / 2)
                nearness = (x - self._origin) @ means.T - means.square().sum(1) / 2
                same = scores.argmax(1) == classes[nearness.argmax(1)]
                tally += torch.stack([same.sum(), torch.tensor(len(x), device=same.device)])
        if self._reduced:
            tally = _sum_over_processes(tally)
        return tally[0] / tally[1]

    def _about(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums and second moment of x - origin, computed from those about the current origin."""
        shift = self._origin - origin.to(self._origin)
        cross = torch.outer(self._sums.sum(0), shift)
        second = self._second + cross + cross.T + self._counts.sum() * torch.outer(shift, shift)
        return self._sums + self._counts[:, None] * shift, second

    def _is_empty(self) -> bool:
        return not bool(self._counts.any())

    def _check_local(self, method: str) -> None:
        if self._reduced:  # a later sum over processes would count each sample several times
            raise RuntimeError(
                f"{method} after all_reduce: the statistics are already those of all processes; call all_reduce only "
                "once, after the last update."
            )

    def _check_classifier(self, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        if tensor is None:
            return None
        check_tensor(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has non-finite entries.")
        return tensor.detach().to(self._counts.device).double()


def _centered(rows: Tensor, scale: Tensor) -> Tensor:
    """Subtract the mean of the rows; rows that are only rounding errors, relative to `scale`, become exactly 0."""
    rows = rows - rows.mean(0)
    return rows * (rows.norm(dim=1, keepdim=True) > ROUNDING * scale)


def _sum_over_processes(vector: Tensor) -> Tensor:
    """Sum `vector` (n,) over processes, on its own device."""
    summed = vector.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)  # what the backend supports
    dist.all_reduce(summed)
    return summed.to(vector.device)
