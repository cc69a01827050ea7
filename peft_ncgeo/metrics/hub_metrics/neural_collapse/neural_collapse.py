"""Neural collapse of features and classifier, as a metric for `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch
from numpy.typing import ArrayLike

from peft_ncgeo.geometry import NeuralCollapse

_DESCRIPTION = """
Neural collapse NC1-NC4 of features and, optionally, a linear classifier. mu_c is the mean feature of class c, mu_G the
mean of these means, M the (K', d) matrix of rows mu_c - mu_G over the K' classes with samples, G = M M^T,
S_B = M^T M / K', S_W = 1/N sum_i (x_i - mu_{y_i})(x_i - mu_{y_i})^T and W the weights' rows minus their mean. Then
nc1 = tr(S_B^+ S_W) / K' (variability within classes); nc2 and nc3 are the Frobenius distances of G and of W M^T, each
over its norm, from the simplex (I - 11^T / K') / sqrt(K' - 1); and nc4 is the share of samples on which the classifier
names the class of the nearest mean. Complete collapse means nc1 = nc2 = nc3 = 0 and nc4 = 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`): Features, (N, d); arrays and tensors are taken too.
    references (`list` of `int`): Class labels, (N,), 0 to K - 1.
    weights (array of `float`, *optional*): (K, d), the classifier's rows, or text features. Needed for NC3 and NC4.
    bias (array of `float`, *optional*): (K,), for NC4.
    num_classes (`int`, *optional*): K. Defaults to the number of rows of `weights`, or to the largest label plus 1.
    center_weights (`bool`): False leaves W as it is. Defaults to True.

Returns:
    nc1 (`float`): tr(S_B^+ S_W) / K', at least 0.
    nc1_trace (`float`): tr(S_W) / tr(S_B), at least 0.
    nc2 (`float`): Distance of G from the simplex, 0 to 2.
    nc2_norm_spread (`float`): Standard deviation of the lengths of M's rows over their mean, at least 0.
    nc2_cosine (`float`): Mean over pairs of classes of |cos(M_c, M_c') + 1 / (K' - 1)|, 0 to 2.
    nc3 (`float`): Distance of W M^T from the simplex, 0 to 2; with weights.
    nc3_cosine (`float`): Mean over classes of cos(W_c, M_c), -1 to 1; with weights.
    nc4 (`float`): Share of samples on which the classifier names the class of the nearest mean, 0 to 1; with weights.

    Values without a definition are nan, with one warning: all of them where fewer than two classes have samples or
    all class means are equal.

Raises:
    ValueError: Features of several widths or not finite, labels that are not in 0 to K - 1, weights or bias of another
        shape, bias without weights, or no samples.

Examples:

    >>> import evaluate
    >>> from peft_ncgeo.evaluation import metric_path
    >>> metric = evaluate.load(metric_path("neural_collapse"))
    >>> features = [[2.0, 0.1], [2.0, -0.1], [-1.0, 2.0], [-1.0, 1.5], [-1.0, -1.4], [-1.0, -2.0]]
    >>> results = metric.compute(predictions=features, references=[0, 0, 1, 1, 2, 2])
    >>> print({name: round(value, 3) for name, value in results.items()})
    {'nc1': 0.009, 'nc1_trace': 0.014, 'nc2': 0.009, 'nc2_norm_spread': 0.003, 'nc2_cosine': 0.005}
"""

_CITATION = """\
@article{papyan2020prevalence,
  title={Prevalence of neural collapse during the terminal phase of deep learning training},
  author={Papyan, Vardan and Han, X. Y. and Donoho, David L.},
  journal={Proceedings of the National Academy of Sciences},
  volume={117},
  number={40},
  pages={24652--24663},
  year={2020},
  doi={10.1073/pnas.2015509117}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class NeuralCollapseMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2008.08186"],
        )
        # "arrow" maps the cache and avoids lists of lists of floats. MetricInfo's constructor refuses a format for
        # inputs that are sequences, because these may differ in length; _compute checks that.
        info.format = "arrow"
        return info

    def _compute(
        self,
        predictions: Any,  # like references a pyarrow ChunkedArray; the package does not import pyarrow
        references: Any,
        weights: ArrayLike | torch.Tensor | None = None,
        bias: ArrayLike | torch.Tensor | None = None,
        num_classes: int | None = None,
        center_weights: bool = True,
    ) -> dict[str, float]:
        widths = {width for chunk in predictions.chunks for width in chunk.value_lengths().unique().to_pylist()}
        if len(widths) != 1 or not all(widths):
            raise ValueError(f"predictions must be features of one width, got widths {sorted(map(str, widths))}.")
        width = widths.pop()
        labels = torch.tensor(references.to_numpy())
        weights, bias = _float64("weights", weights), _float64("bias", bias)
        if num_classes is None:
            rows = () if weights is None else weights.shape[:1]
            num_classes = rows[0] if rows else int(labels.max().clamp_min(0)) + 1
        collapse = NeuralCollapse(num_classes, width, keep_samples=weights is not None)
        start = 0
        for chunk in predictions.chunks:
            end = start + len(chunk)
            features = torch.tensor(chunk.flatten().to_numpy(zero_copy_only=False)).view(-1, width)
            try:
                collapse.update(features, labels[start:end])
            except ValueError as error:
                raise ValueError(f"In samples {start} to {end - 1}: {error}") from None
            start = end
        return collapse.compute(weights, bias, center_weights)


def _float64(name: str, values: ArrayLike | torch.Tensor | None) -> torch.Tensor | None:
    try:
        return None if values is None else torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an array of numbers, got a {type(values).__name__}.") from None
