"""Support images judged by classifiers that have not seen them, against fits by hand without them."""

from __future__ import annotations

import pytest
import torch

from peft_ncgeo import FewShotClassifier
from peft_ncgeo.few_shot import CLAP, GaussianDiscriminant, LPPlusPlus, TipAdapter
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.few_shot.leave_one_out import folds, head_accuracies, prototype_accuracies
from peft_ncgeo.geometry.heads import Heads
from peft_ncgeo.hub import create_card
from peft_ncgeo.hub.few_shot_record import record_few_shot

from ..conftest import pixels
from .made_up_support import drawn_support, unit
from .support import draw, full_contrast, loop, means, support, tsa

BEFORE, AFTER = "leave_one_out_accuracy_before", "leave_one_out_accuracy"


def test_images_are_judged_without_them():
    """Seven images of class 0, three of class 1, two of class 2 and one of class 3."""
    labels = torch.tensor([0, 3, 1, 0, 2, 0, 1, 0, 0, 2, 0, 1, 0])
    parts = [part.tolist() for part in folds(labels)]
    assert sorted(i for part in parts for i in part) == [i for i in range(13) if i != 1]  # alone in its class
    assert [len(part) for part in parts] == [4, 4, 2, 1, 1]  # at most one of a class of five or fewer
    assert [sum(labels[part] == 0) for part in parts] == [2, 2, 1, 1, 1]

    features = support(labels, classes=4)[0]

    def fit(x, y):
        return Heads(*loop(x, y, full_contrast, lambda p: torch.optim.Adam(p, lr=0.05), 20))

    found, right = prototype_accuracies(features, labels, 4, fit), {BEFORE: 0, AFTER: 0}
    for part in parts:
        kept = [i for i in range(13) if i not in part]
        x, y = features[kept], labels[kept]
        for moment, heads in ((BEFORE, (torch.eye(8).double(),) * 2), (AFTER, fit(x, y))):
            cosines = unit(features[part] @ heads[0]) @ unit(means(x, y) @ heads[1]).T
            right[moment] += int((cosines.argmax(1) == labels[part]).sum())
    assert found == {moment: pytest.approx(count / 12) for moment, count in right.items()}
    assert right[BEFORE] != right[AFTER]
    assert prototype_accuracies(draw(3, 5), torch.tensor([2, 0, 1]), 3, fit) == {}

    known = drawn_support()
    zero_shot = known.text_logits(known.features[0]).argmax(1) == known.labels
    for head in (TipAdapter(True, 2.0, 3.0, epochs=2), LPPlusPlus(9), CLAP(epochs=2)):
        right = 0
        for part in folds(known.labels):
            rest = [i for i in range(10) if i not in part]
            less = known._replace(features=known.features[:, rest], labels=known.labels[rest])
            logits = head.logits(head.fit(less)[0], known.features[0, part])
            right += int((logits.argmax(1) == known.labels[part]).sum())
        measured = head_accuracies(head, known, head.fit(known)[1])
        assert measured == {BEFORE: pytest.approx(float(zero_shot.float().mean())), AFTER: pytest.approx(right / 10)}
    own = GaussianDiscriminant().fit(known)[1]  # it has left each image out already
    assert head_accuracies(GaussianDiscriminant(), known, own).keys() == {BEFORE}


@pytest.mark.slow
def test_what_adapt_tells(recwarn):
    labels = [2, 0, 1, 1, 0, 2, 2, 2, 0]
    classifier = adapt(tsa(), pixels(9, seed=4), labels, steps=2)  # adapters would be trained again
    assert BEFORE in classifier.metrics
    assert AFTER not in classifier.metrics
    assert "unknown after" in repr(classifier)
    assert "no class has two" in repr(adapt(tsa(), pixels(3, seed=4), ["a", "b", "c"], steps=1))
    assert not [found for found in recwarn if "leave-one-out" in str(found.message)]
    model = tsa().unload()
    with pytest.warns(UserWarning, match="leave-one-out"):  # images of noise, where steps can only harm
        worse = next(c for c in (adapt(model, pixels(9, seed=s), labels, lr=0.1) for s in range(9)) if is_worse(c))
    before, after = worse.metrics[BEFORE], worse.metrics[AFTER]
    assert repr(worse).endswith(f"leave-one-out accuracy {100 * before:.1f} % before, {100 * after:.1f} % after)")
    assert repr(FewShotClassifier(model, worse.heads, worse.prototypes, [0, 1, 2])).endswith("(CoPA, 3 classes)")
    record = record_few_shot(classifier)
    assert record.leave_one_out == {"before": classifier.metrics[BEFORE]}
    assert f"{100 * classifier.metrics[BEFORE]:.1f} % before" in create_card(record=record).text


def is_worse(classifier) -> bool:
    return classifier.metrics[AFTER] < classifier.metrics[BEFORE]
