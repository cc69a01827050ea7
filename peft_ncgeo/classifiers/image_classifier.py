"""Image classifier made of an image tower and a new head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from ..data.checks import check_dataset
from ..data.class_prompts import list_names
from ..data.head_names import same_names
from ..geometry.sphere import l2_normalize
from ..models.image_classifier import HEADS, ImageClassifierConfig, ImageClassifierModel, check_choice
from ..models.image_towers import put_head, take_image_tower
from ..models.towers import logit_scale, reads_text
from ..validation import check_bool, check_int, check_positive, short_repr
from .head_rows import before_projection, mean_rows, text_rows

STARTS = ("random", "texts", "means")
_Classifier = TypeVar("_Classifier", bound="ImageClassifier")


class ImageClassifier(ImageClassifierModel):
    """[`~peft_ncgeo.models.image_classifier.ImageClassifierModel`] that can be made from any image tower."""

    @classmethod
    def from_backbone(
        cls: type[_Classifier],
        model: nn.Module,
        class_names: Sequence[str] | None = None,
        num_labels: int | None = None,
        head: str = "linear",
        init: str = "random",
        processor: Any = None,
        template: str | None = None,
        scale: float | None = None,
        projected: bool = True,
        dataset: Dataset | None = None,
        image_column: str = "image",
        label_column: str = "label",
        batch_size: int = 64,
        teacher: nn.Module | None = None,
    ) -> _Classifier:
        r"""Make an image classifier from a model's image tower, with a new head `classifier`.

        The feature f of an image is the one that the model itself pools: of a dual encoder such as CLIP or SigLIP,
        its image feature; of a backbone, the feature of [`~peft_ncgeo.models.towers.find_pooling`]. It is not the
        mean of patches that `CLIPForImageClassification` uses. Logits are

        .. math:: z_k = w_k \cdot f + b_k \quad \text{(linear)}, \qquad z_k = s \cos(f, w_k) \quad \text{(cosine)}

        The head starts as follows; `t_k` are text features of length 1, `e^l` is CLIP's logit scale, `m_k` are class
        means:

        | init | linear | cosine |
        |---|---|---|
        | random | `w` normal with standard deviation 0.02, `b = 0` | `w` normal with standard deviation 0.02 |
        | texts | `w_k = e^l t_k`, `b = 0` | `w_k = t_k` |
        | means | `w_k = m_k`, `b_k = -|m_k|^2 / 2` | `w_k = m_k / |m_k|` |

        With `projected=False`, a dual encoder's feature f is the one before its projection P, and `t_k` becomes
        `P t_k`, of length 1 for a cosine head: `w_k = P t_k / |P t_k|`, as in LIFT. A linear head then gives the
        logits that it would give after the projection.

        From texts, a cosine head with `scale` `e^l` after the projection gives zero-shot's logits, `e^l cos(f, t_k)`.
        A linear head gives these times the length of f: the order of classes is the same, but probabilities are
        sharper if features are longer than 1, and training is harder to start: prefer the cosine head. From means, a
        linear head chooses the class with the nearest mean, since `z_k` is `-|f - m_k|^2 / 2` up to a term that all
        classes share.

        With a `teacher`, the text features are those of another dual encoder, for instance a larger one, and a random
        `projector` (linear, batch norm, ReLU, linear) maps f into their space: this is PromptKD's student. Train it
        under an adapter with `modules_to_save=["projector"]`.

        The tower shares its weights with `model`: if you train all weights, both change. Save the classifier and its
        image processor into one folder for `pipeline("image-classification")`, and load it from there before you put
        an adapter on it, so that the adapter names its base.

        Args:
            model: a dual encoder, its image part, or a backbone without a head; without adapters.
            class_names: K names of the outputs, written into the config. Default for means: the data set's.
            num_labels: K, if you have no names.
            head: "linear" or "cosine".
            init: "random", "texts" or "means".
            processor: for texts, the processor of the model that reads them, with its tokenizer; for means, the
                model's image processor.
            template: text around a class name, for texts. Default: the adapter's own, else "a photo of a {}.".
            scale: s, of a cosine head. Default: 25, as in LIFT; with a teacher, its own `e^l`.
            projected: False: take the feature of a dual encoder before its projection. A model without a projection
                ignores this.
            dataset: labelled images, for means.
            image_column, label_column: of the data set.
            batch_size: images per pass, for means.
            teacher: dual encoder, with or without adapters, whose texts a cosine head starts from.

        Returns:
            The classifier in evaluation mode, in the model's dtype and on its device.

        Raises:
            TypeError, ValueError, NotImplementedError: an argument does not fit, or the model's pooled feature is not
                known.

        References: J.-X. Shi, T. Wei, Z. Zhou, J.-J. Shao, X.-Y. Han, Y.-F. Li, Long-Tail Learning with Foundation
        Model: Heavy Fine-Tuning Hurts (LIFT), arXiv 2309.10019, for the cosine head that starts from class texts;
        Z. Li et al., PromptKD, arXiv 2403.02781, for the student of a teacher's texts.

        Example:

        ```python
        clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch16")
        model = ImageClassifier.from_backbone(clip, names, head="cosine", init="texts", processor=processor)
        model.save_pretrained("pandas")
        processor.save_pretrained("pandas")
        pipeline("image-classification", "pandas")("photo.jpg")
        ```
        """
        check_choice("head", head, HEADS)
        check_choice("init", init, STARTS)
        if teacher is not None and (head, init) != ("cosine", "texts"):
            raise ValueError("A teacher gives its texts to a cosine head; pass head='cosine' and init='texts'.")
        reader = model if teacher is None else teacher
        scale = scale if scale is None else check_positive("scale", scale)
        projected = check_bool("projected", projected)
        batch_size = check_int("batch_size", batch_size, least=1)
        if (dataset is not None) != (init == "means"):
            raise ValueError("init='means' needs a labelled dataset, and no other init reads one.")
        if init != "random" and processor is None:
            raise ValueError(f"init={init!r} needs the model's processor; pass processor.")
        names = None if class_names is None else _check_class_names(class_names)
        if dataset is not None:
            known = check_dataset(dataset, image_column, label_column, False)
            if names is not None and not same_names(names, known):
                raise ValueError(
                    f"class_names={short_repr(names)} are not the data set's {short_repr(known)} in the same order; "
                    "leave them out, or map its labels with align_labels_with_mapping."
                )
            names = names or known
        labels = _labels(names, num_labels)
        if init == "texts":
            _check_texts(reader, names)
            texts = text_rows(reader, names or [], processor, template)
            texts = texts if projected or teacher is not None else before_projection(model, texts)
        tower = take_image_tower(model, projected)
        if scale is None:
            scale = 25.0 if teacher is None else logit_scale(teacher).double().exp().item()
        made = put_head(cls, tower, head, scale, None if teacher is None else texts.shape[1], **labels)
        made._init_weights(made.classifier)
        if init == "texts":
            made._set_head(l2_normalize(texts) if head == "cosine" else logit_scale(model).exp() * texts, None)
        elif dataset is not None:
            rows = mean_rows(made, dataset, processor, image_column, label_column, batch_size)
            made._set_head(l2_normalize(rows) if head == "cosine" else rows, -rows.square().sum(-1) / 2)
        return made

    @torch.no_grad()
    def _set_head(self, weight: Tensor, bias: Tensor | None) -> None:
        for parameter, value in ((self.classifier.weight, weight), (self.classifier.bias, bias)):
            if parameter is not None and value is not None:
                parameter.copy_(value)


# From now on the auto class makes this class too; before, nobody can have asked for it.
AutoModelForImageClassification.register(ImageClassifierConfig, ImageClassifier, exist_ok=True)


def _check_class_names(class_names: Sequence[str]) -> list[str]:
    names = list_names(class_names)
    if double := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"class_names has {short_repr(double)} twice; rename one.")
    return names


def _labels(names: list[str] | None, num_labels: int | None) -> dict[str, Any]:
    """Return the config fields with the names of the outputs, or with their number."""
    if names is None and num_labels is None:
        raise ValueError("The classes are not known; pass class_names or num_labels.")
    count = len(names or ()) if num_labels is None else check_int("num_labels", num_labels)
    if names is not None and count != len(names):
        raise ValueError(f"num_labels={count}, but class_names has {len(names)} names; leave num_labels out.")
    if count < 2:
        raise ValueError(f"A classifier needs at least two classes, got {count}.")
    if names is None:
        return {"num_labels": count}
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}


def _check_texts(model: nn.Module, names: list[str] | None) -> None:
    if names is None:
        raise ValueError("init='texts' needs class_names.")
    if not reads_text(model):
        raise ValueError(f"init='texts' needs a model that reads text, such as CLIP; {type(model).__name__} does not.")
