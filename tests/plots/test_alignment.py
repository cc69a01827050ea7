"""The figure of classes before and after alignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from peft_ncgeo.plots import plot_alignment

from .drawing import moments


def by_hand(before, after):
    """The numbers of the figure, in numpy, every class with a mean."""
    units = {}
    for moment, pair in (("before", before), ("after", after)):
        means, weights = (tensor.double().numpy() for tensor in pair)
        for part, rows in (("means", means - means.mean(0)), ("weights", weights)):
            units[f"{part}_{moment}"] = rows / np.sqrt((rows**2).sum(1))[:, None]
    stacked = np.concatenate(list(units.values()))
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    plane = vectors[:, values.argsort()[::-1][:2]]
    plane = np.stack([v if v[np.abs(v).argmax()] > 0 else -v for v in plane.T], axis=1)
    numbers = {key: rows @ plane for key, rows in units.items()}
    for moment in ("before", "after"):
        numbers[f"cosines_{moment}"] = np.einsum("cd,kd->ck", units[f"weights_{moment}"], units[f"means_{moment}"])
    return numbers


@pytest.mark.parametrize("count", [2, 10, 100])
def test_alignment_by_hand_and_as_drawn(tmp_path, drawn, count):
    before, after = moments(count)
    names = [f"class {i}" for i in range(count)]
    numbers = plot_alignment(before, after, tmp_path / "f.png", names, title="a title")
    expected = by_hand(before, after)
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(numbers[key], value, atol=1e-5, err_msg=key)

    (figure,) = drawn
    planes, maps = figure.axes[:2], figure.axes[2:4]
    labels = names if count <= 30 else []
    for moment, plane, heat in zip(("before", "after"), planes, maps, strict=True):
        lines = [line.get_xydata() for line in plane.lines]
        tips = np.concatenate([numbers[f"means_{moment}"], numbers[f"weights_{moment}"]])
        np.testing.assert_array_equal([line[0] for line in lines], np.zeros((2 * count, 2)))
        np.testing.assert_array_equal([line[1] for line in lines], tips)
        styles = {(line.get_linestyle(), line.get_marker()) for line in plane.lines[:count]}
        assert styles.isdisjoint({(line.get_linestyle(), line.get_marker()) for line in plane.lines[count:]})
        colours = [tuple(line.get_color()) for line in plane.lines]
        assert colours[:count] == colours[count:]
        assert len(set(colours)) == count
        assert plane.get_aspect() == 1
        assert plane.patches[0].get_radius() == 1
        assert plane.get_title().startswith(f"{moment}: {(tips**2).sum() / (2 * count):.0%}")
        (image,) = heat.images
        np.testing.assert_array_equal(image.get_array(), numbers[f"cosines_{moment}"])
        assert image.get_clim() == (-1, 1)
        assert heat.get_title() == f"{moment}: mean of the diagonal {np.diag(numbers[f'cosines_{moment}']).mean():.3f}"
        assert [label.get_text() for label in heat.get_xticklabels()] == labels
    assert [label.get_text() for label in maps[0].get_yticklabels()] == labels
    assert figure.get_suptitle() == "a title"
    picture = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))
    assert (picture[[0, -1]] == 255).all(), "something is cut off"
    assert (picture[:, [0, -1]] == 255).all(), "something is cut off"


def test_alignment_leaves_out_classes_without_direction(tmp_path, drawn):
    """No samples before, a weight of 0 after; classes keep their names, and the cosines are those of the moment."""
    before, after = moments(6)
    before[0][1] = torch.nan
    after[1][4] = 0
    kept = [0, 2, 3, 5]
    numbers = plot_alignment(before, after, tmp_path / "f.png")
    assert [label.get_text() for label in drawn[0].axes[2].get_xticklabels()] == ["0", "2", "3", "5"]
    for moment, (means, weights) in (("before", before), ("after", after)):
        mu = (means - means.nanmean(0))[kept]
        cosines = torch.cosine_similarity(weights[kept][:, None], mu[None], dim=-1)
        np.testing.assert_allclose(numbers[f"cosines_{moment}"], cosines.numpy(), atol=1e-5)
        assert numbers[f"weights_{moment}"].shape == (4, 2)


def test_alignment_takes_tensors_of_any_kind(tmp_path):
    """Half precision, with a graph, and classes that are perfectly aligned on a line."""
    row = torch.tensor([1.0, 2.0, -2.0])
    means = torch.stack([row, -row]).bfloat16()
    weights = torch.stack([3 * row, -row]).requires_grad_()
    numbers = plot_alignment((means, weights), (means.double(), weights), tmp_path / "f.png")
    assert numbers["cosines_after"] == pytest.approx(np.array([[1, -1], [-1, 1]]))
    assert np.abs(numbers["weights_before"][:, 0]) == pytest.approx([1, 1])


def test_alignment_errors(tmp_path):
    before, after = moments(3)
    path = tmp_path / "f.png"
    with pytest.raises(ValueError, match=r"one shape \(K, d\), d >= 2.*\(2, 16\)"):
        plot_alignment(before, (after[0], after[1][:2]), path)
    with pytest.raises(ValueError, match=r"one shape"):
        plot_alignment((before[0][:, :1],) * 2, (before[0][:, :1],) * 2, path)
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        plot_alignment(before, after, path, ["a", "b"])
    with pytest.raises(ValueError, match="weights after are not finite"):
        plot_alignment(before, (after[0], after[1] / 0), path)
    before[0][0], after[0][1] = torch.nan, torch.nan
    with pytest.raises(ValueError, match="^1 classes have a mean"):
        plot_alignment(before, after, path)
    assert not path.exists()
