"""Training against texts of the classes: gradients, evaluation, files, cards."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.losses import PointwisePreservation

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor
from .runs import Gradients, lora_clip, prompted_clip, trainer, vit

TEXTS = {NAMES[0]: ["a cat, red in the tree", "the photo of the red cat", "red"], NAMES[3]: ["a {} in the blue"]}


def test_gradients_are_those_of_the_means_of_single_texts(tmp_path):
    """Packed and padded alike: computed again with one text in a pass; the frozen model reads the same texts."""
    kept, pieces = Gradients(), Gradients()
    options = {
        "losses": [PointwisePreservation(2.0, text_weight=1.0, image_weight=1.0, prediction_weight=0.0)],
        "train": tiny_images(8),
        "class_texts": TEXTS,
    }
    run = trainer(tmp_path, callbacks=[kept], max_steps=1, **options)
    run.train()
    trainer(tmp_path, callbacks=[pieces], max_steps=1, text_batch_size=1, **options).train()

    model = prompted_clip().train()
    texts = dict(run.task.texts(NAMES))
    assert texts.pop("counts") == [3, 1, 1, 1, 1]

    def features(**images):
        pixels = tiny_processor().image_processor(tiny_images(8)["image"][:], return_tensors="pt")["pixel_values"]
        image = normalize(model.get_image_features(pixel_values=pixels).pooler_output)
        rows = [
            normalize(model.get_text_features(input_ids=own[None, : int(mask.sum())]).pooler_output)[0]
            for own, mask in zip(images["input_ids"], images["attention_mask"], strict=True)
        ]
        return image, torch.stack([normalize(torch.stack(rows[:3]).mean(0), dim=0), *rows[3:]])

    image, text = features(**texts)
    with torch.no_grad(), model.disable_adapter():
        frozen = features(**run.task.frozen_texts(NAMES)[0])
    logits = model.get_base_model().logit_scale.exp() * image @ text.T
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tiny_images(8)["label"][:]))
    loss = loss + 2.0 * sum((a - b).abs().mean() for a, b in zip((image, text), frozen, strict=True))
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(kept.steps[0][name], parameter.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(pieces.steps[0][name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_texts_go_with_the_adapter(tmp_path):
    test = tiny_images(10, seed=1)
    run = trainer(tmp_path, lora_clip(), eval_dataset=test, class_texts=TEXTS, max_steps=2)
    run.train()
    predicted = torch.tensor(run.predict(test).predictions).softmax(-1)
    run.save_model()
    classifier = ZeroShotClassifier(load_adapter(tmp_path, tiny_clip()), tiny_processor())
    torch.testing.assert_close(classifier.predict_proba(test["image"][:]), predicted, rtol=1e-3, atol=1e-5)
    assert classifier.class_texts == {name: tuple(texts) for name, texts in TEXTS.items()}
    assert run.record().class_texts == TEXTS
    on = trainer(tmp_path, classifier.model, train=tiny_images(8))
    assert on.task.class_texts == classifier.class_texts, "trained on with the texts that it had"
    for expected, options in (("'lion'", {"model": lora_clip()}), ("reads no text", {"model": vit()})):
        processor = tiny_processor() if "lion" in expected else tiny_processor().image_processor
        with pytest.raises(ValueError, match=expected):
            trainer(tmp_path, class_texts={"lion": ["a lion"]}, processor=processor, **options)
