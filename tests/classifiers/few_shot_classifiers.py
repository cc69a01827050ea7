"""Few-shot classifiers of tiny backbones."""

from __future__ import annotations

import torch
from peft import get_peft_model

from peft_ncgeo import CoPAConfig
from peft_ncgeo.classifiers.few_shot import FewShotClassifier
from peft_ncgeo.few_shot.adapt import adapt

from ..conftest import pixels
from ..contracts.copa_backbones import BACKBONES

LABELS = [2, 0, 1, 1, 0, 2, 2, 2, 0]
SETTINGS = {"steps": 5, "lr": 0.02}
CONFIGS = {
    "heads": {},
    "shared": {"shared": True, "temperature": 0.3},
    "adapters": {"residual_adapters": True},
}


def images(count: int = 30) -> torch.Tensor:
    return pixels(count, seed=5)


def few_shot(name: str = "vit", labels=LABELS, **fields) -> FewShotClassifier:
    model = get_peft_model(BACKBONES[name].build(), CoPAConfig(**fields))
    return adapt(model, pixels(9, seed=4), labels, **SETTINGS)


def assert_same(found: FewShotClassifier, expected: FewShotClassifier) -> None:
    """Probabilities, classes and weights to the last bit."""
    assert found.classes == expected.classes
    assert [type(name) for name in found.classes] == [type(name) for name in expected.classes]
    assert torch.equal(found.predict_proba(images()), expected.predict_proba(images()))
    assert found.predict(images()) == expected.predict(images())
    assert torch.equal(found.features(images()), expected.features(images()))
    assert torch.equal(found.prototypes, expected.prototypes)
    assert torch.equal(found.heads.image, expected.heads.image)
    assert torch.equal(found.heads.prototype, expected.heads.prototype)
    assert found.temperature == expected.temperature
