"""The carried few-shot domains: what the loader promises, and that their images are what their labels say."""

import datasets
import numpy as np
import pytest

from peft_ncgeo.data import EpisodeSampler, load_demo, load_few_shot_domains
from peft_ncgeo.data.demo import (
    ASSETS,
    FASHION_NAMES,
    VENDORS,
    VIEW_PARAMETERS,
    draw_views,
    load_concepts,
    load_drawings,
    load_fashion_mnist,
)
from peft_ncgeo.data.domains import LEAST_DRAWINGS, load_digits

REPORT = {"twemoji": 636, "emojione": 443, "fashion_mnist": 2000, "mnist": 2000, "digits": 1797}
DEVELOPMENT = {"twemoji": 742, "emojione": 353, "fashion_mnist": 3000}
CLASSES = {
    "report": {"twemoji": 28, "emojione": 21, "fashion_mnist": 10, "mnist": 10, "digits": 10},
    "development": {"twemoji": 29, "emojione": 21, "fashion_mnist": 10},
}
SIDE = {"twemoji": 32, "emojione": 32, "fashion_mnist": 28, "mnist": 28, "digits": 8}


@pytest.fixture(scope="module", params=["report", "development"])
def split(request) -> str:
    return request.param


def names(domain) -> list[str]:
    return domain.images.features["label"].names


def labels(domain) -> np.ndarray:
    return np.asarray(domain.images["label"][:])


def pixels(domain) -> np.ndarray:
    return np.stack([np.asarray(image) for image in domain.images[:]["image"]])


def stored(domain) -> list[bytes]:
    cells = domain.images.cast_column("image", datasets.Image(decode=False))["image"]
    return [cell["bytes"] for cell in cells]


def test_sizes_and_labels(split):
    domains = load_few_shot_domains(split)
    assert {name: len(d.images) for name, d in domains.items()} == (REPORT if split == "report" else DEVELOPMENT)
    assert {name: len(names(d)) for name, d in domains.items()} == CLASSES[split]
    for name, domain in domains.items():
        assert set(domain.images.column_names) == {"image", "label"}
        assert domain.images[0]["image"].mode == "RGB"
        assert pixels(domain).shape == (len(domain.images), SIDE[name], SIDE[name], 3)
        assert np.bincount(labels(domain), minlength=len(names(domain))).min() >= 10
        assert domain.seen == (name in VENDORS)
    assert names(domains["fashion_mnist"]) == list(FASHION_NAMES)


def test_the_report_is_the_default():
    assert list(load_few_shot_domains()) == list(REPORT)


def test_the_splits_share_no_image_and_no_emoji_class():
    report, development = load_few_shot_domains("report"), load_few_shot_domains("development")
    every = [image for domains in (report, development) for domain in domains.values() for image in stored(domain)]
    assert len(set(every)) == len(every) == sum(REPORT.values()) + sum(DEVELOPMENT.values())
    halves = [set().union(*(names(domains[vendor]) for vendor in VENDORS)) for domains in (report, development)]
    assert not halves[0] & halves[1]
    # EmojiOne draws fewer: what it has enough of, Twemoji has
    assert all(set(names(domains["emojione"])) < set(names(domains["twemoji"])) for domains in (report, development))
    for part, domains in (("test", report), ("train", development)):
        images = np.repeat(load_fashion_mnist(part)[0][..., None], 3, axis=-1)
        assert (pixels(domains["fashion_mnist"]) == images).all()


@pytest.mark.parametrize("vendor", VENDORS)
def test_emoji_classes_are_the_subgroups_of_different_drawings(vendor):
    """Counted anew: drawings that a vendor uses in one subgroup only, each once."""
    concepts, subgroups = load_concepts()["concepts"], {}
    for row, drawing in load_drawings()[vendor].items():
        subgroups.setdefault(drawing.tobytes(), set()).add(concepts[row]["subgroup"])
    counts: dict[str, int] = {}
    for known in subgroups.values():
        if len(known) == 1:
            name = next(iter(known))
            counts[name] = counts.get(name, 0) + 1
    found = {}
    for split in ("report", "development"):
        domain = load_few_shot_domains(split)[vendor]
        assert names(domain) == sorted(names(domain))
        found |= dict(zip(names(domain), np.bincount(labels(domain)).tolist(), strict=True))
    assert found == {name: count for name, count in counts.items() if count >= LEAST_DRAWINGS}
    assert len(set(subgroups)) < len(load_drawings()[vendor])  # there are drawings to leave out


@pytest.mark.parametrize("vendor", VENDORS)
def test_emoji_are_their_drawings_in_one_fixed_view(split, vendor):
    concepts, drawings = load_concepts()["concepts"], load_drawings()[vendor]
    parameters = np.random.default_rng([5, VENDORS.index(vendor)]).random((len(concepts), VIEW_PARAMETERS))
    rows = list(drawings)
    views = draw_views(np.stack([drawings[row] for row in rows]), parameters[rows])
    subgroup = {view.tobytes(): concepts[row]["subgroup"] for row, view in zip(rows, views, strict=True)}
    domain = load_few_shot_domains(split)[vendor]
    expected = [names(domain)[label] for label in labels(domain)]
    assert [subgroup[image.tobytes()] for image in pixels(domain)] == expected


def test_views_are_none_of_the_demo_s():
    demo = load_demo(shots=1).splits
    views = {np.asarray(image).tobytes() for part in ("base", "new", "validation") for image in demo[part][:]["image"]}
    for vendor in VENDORS:
        assert not views & {image.tobytes() for image in pixels(load_few_shot_domains()[vendor])}


def nearest_mean_accuracy(images: np.ndarray, of: np.ndarray) -> float:
    """On the odd images of each class, with class means of the even ones."""
    flat, even = images.reshape(len(images), -1).astype(np.float64), np.zeros(len(of), dtype=bool)
    for label in range(10):
        even[np.flatnonzero(of == label)[::2]] = True
    means = np.stack([flat[even & (of == label)].mean(axis=0) for label in range(10)])
    distances = (means**2).sum(axis=1) - 2 * flat[~even] @ means.T  # squared, up to a constant a row
    return float((distances.argmin(axis=1) == of[~even]).mean())


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_digits_are_recognisable_and_white_on_black(name):
    domain = load_few_shot_domains()[name]
    assert names(domain) == list("0123456789")
    images = pixels(domain)
    assert (images == images[..., :1]).all()
    assert nearest_mean_accuracy(images[..., 0], labels(domain)) > 0.7
    border = np.concatenate([images[:, 0], images[:, -1]], axis=1)
    assert border.mean() < images.mean() < 128
    assert images.max() == 255


def test_digits_stand_upright():
    """The lower half of a 6 is the fuller one, the upper half of a 9 and of a 7; a 1 is higher than wide."""
    for name in ("mnist", "digits"):
        images, of = load_digits(name)
        middle = images.shape[1] // 2
        lower = {d: images[of == d, middle:].mean() / images[of == d].mean() for d in (6, 7, 9)}
        assert lower[6] > 1.05 > lower[9]
        assert lower[6] > 1.05 > lower[7]
        ones = images[of == 1].mean(axis=0)
        assert ones.sum(axis=0).max() > 1.5 * ones.sum(axis=1).max()
        # a 7's bar ends on the right, where its stroke begins: mirrored, it would not
        sevens = images[of == 7].mean(axis=0)
        assert sevens[:, middle:].sum() > sevens[:, :middle].sum()


def test_carried_digits():
    images, of = load_digits("mnist")
    assert (images.shape, images.dtype, of.shape) == ((2000, 28, 28), np.uint8, (2000,))
    assert np.bincount(of).tolist() == [200] * 10
    images, of = load_digits("digits")
    assert (images.shape, images.dtype, of.shape) == ((1797, 8, 8), np.uint8, (1797,))
    assert np.bincount(of).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's test part
    assert set(np.unique(images)) == {round(255 * level / 16) for level in range(17)}


@pytest.mark.parametrize("setting", [{}, {"shots": 5}, {"ways": 5, "shots": 1}])
def test_every_domain_serves_episodes(split, setting):
    for name, domain in load_few_shot_domains(split).items():
        sampler, of = EpisodeSampler(domain.images, **setting), labels(domain)
        for index in range(10):
            episode = sampler[index]
            assert (of[episode.query] == episode.classes[episode.query_labels]).all(), name
            assert len(episode.query) >= 5 * len(episode.classes)


def test_calls_do_not_share_what_can_be_changed(split):
    first = load_few_shot_domains(split)
    for domain in first.values():
        domain.images.set_transform(lambda rows: {"label": rows["label"]})
    first.pop("twemoji")
    second = load_few_shot_domains(split)
    assert "twemoji" in second
    assert all(set(domain.images[0]) == {"image", "label"} for domain in second.values())


def test_assets_are_small_and_licensed():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert (ASSETS / "digits.npz").stat().st_size < 900_000
    notice = (ASSETS / "NOTICE").read_text(encoding="utf-8")
    for source in ("Yann LeCun", "Corinna Cortes", "Burges", "Juan Cazala", "Alpaydin", "Kaynak", "scikit-learn"):
        assert source in notice


@pytest.mark.parametrize("split", ["test", "", None])
def test_unknown_split_gets_one_line(split):
    with pytest.raises(ValueError, match=r"split must be one of \['development', 'report'\], got ") as caught:
        load_few_shot_domains(split)
    assert "\n" not in str(caught.value)
