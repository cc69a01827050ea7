"""Made-up tensors: every dtype, size and oddity that a caller may come with."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
KINDS = ("normal", "constant", "zero", "duplicated", "one row of 0", "spread")
SCALES = {torch.float16: (1.0, 10.0)}  # whose gradients float16 can hold
WIDE_SCALES = (1e-25, 1e-12, 1.0, 1e12, 1e30)
# what stands in the place of a number, or of a tensor
NO_NUMBERS = ("3", None, [1.0], 1j, object(), torch.ones(2))
NO_TENSORS = ("abc", 3.0, [[1.0, 2.0]], np.ones((2, 2)), object())

dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**16)


def rows_of(kind: str, n: int, d: int, seed: int) -> np.ndarray:
    """(n, d) float64 of about 1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    if kind == "constant":
        x[:] = x[:1]
    elif kind == "zero":
        x[:] = 0
    elif kind == "duplicated":
        x = x[rng.integers(0, max(1, n // 2), n)]
    elif kind == "one row of 0" and n:
        x[rng.integers(n)] = 0
    elif kind == "spread":
        x *= 10.0 ** rng.integers(-3, 4, (n, 1))
    return x


@st.composite
def features(draw, n: int, d: int, dtype: torch.dtype | None = None, kinds=KINDS, scales=None) -> torch.Tensor:
    """(n, d), finite."""
    dtype = draw(dtypes) if dtype is None else dtype
    scale = draw(st.sampled_from(scales or SCALES.get(dtype, WIDE_SCALES)))
    x = rows_of(draw(st.sampled_from(kinds)), n, d, draw(seeds)) * scale
    tensor = torch.from_numpy(x)
    if dtype == torch.float16:
        tensor = tensor.clamp(-6e4, 6e4)
    return tensor.to(dtype)


@st.composite
def labels(draw, n: int, classes: int) -> torch.Tensor:
    """(n,) in 0..K-1, in any dtype of integers."""
    values = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return torch.tensor(values, dtype=draw(st.sampled_from(INTEGERS)))


@st.composite
def no_labels(draw, n: int, classes: int | None, lowest: int = 0) -> object:
    """Draw invalid labels for n samples: numbers out of range where K is known, other dtypes, other shapes."""
    right = torch.zeros(n, dtype=torch.int64)
    kind = draw(
        st.sampled_from(("dtype", "shape", "type") if classes is None else ("range", "dtype", "shape", "type"))
    )
    if kind == "range":
        right[draw(st.integers(0, n - 1))] = draw(
            st.one_of(st.sampled_from([lowest - 1, -100, classes, 10**9, -(2**62)]), st.integers(classes, 2**62))
        )
        return right
    if kind == "dtype":
        return right.to(draw(st.sampled_from([torch.bool, torch.complex64, *FLOATS])))
    if kind == "shape":
        return draw(st.sampled_from([right[:0], torch.zeros(n + 1).long(), right[:, None], right.sum()]))
    return draw(st.sampled_from(NO_TENSORS))


@st.composite
def spoilt(draw, tensor: torch.Tensor, whole_rows_of_nan: bool = False) -> object:
    """A tensor of features as it must not be: with nan or inf, of another shape, dtype or type, empty, or None."""
    kind = draw(st.sampled_from(("value", "value", "shape", "dtype", "type", "empty")))
    if kind == "value":
        tensor = tensor.detach().clone()
        bad = draw(
            st.sampled_from([float("inf"), -float("inf")] if whole_rows_of_nan else [float("nan"), float("inf")])
        )
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = bad
        return tensor
    tensor = tensor.detach()
    if kind == "shape":
        return draw(st.sampled_from([tensor[None], tensor.flatten()[0]]))
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from([torch.bool, torch.complex64])))
    if kind == "empty":
        return draw(st.sampled_from([tensor[:0], tensor[..., :0]]))
    return draw(st.sampled_from(NO_TENSORS))


def wide(tensor: torch.Tensor) -> np.ndarray:
    """Its numbers in float64."""
    return tensor.detach().double().numpy()


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; rows of 0 stay."""
    largest = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(largest > 0, largest, 1)
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / np.where(length > 0, length, 1)
