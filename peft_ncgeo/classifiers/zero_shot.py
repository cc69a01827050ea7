"""Zero-shot classification of images by any class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.class_prompts import class_prompts, list_names
from ..data.class_texts import ClassTexts, list_class_texts
from ..data.processors import find_processor
from ..geometry.sphere import cosine_logits, mean_directions
from ..loading.load import fetch_adapter, load_adapter
from ..models.adapters import check_adapter_weights, unwrap
from ..models.devices import execution_device, one_at_a_time
from ..models.image_encoder import encode_images, image_inputs
from ..models.snapshots import unchanged_on_error
from ..models.templates import DEFAULT_TEMPLATE, check_template
from ..models.text_encoder import encode_texts
from ..models.text_setting import active_text_setting
from ..models.towers import check_encoders, logit_bias, logit_scale, reads_text
from ..tuners.prompt_config import active_prompt_config
from ..validation import short_repr
from .base import Classifier, Scorer, Views
from .best_names import best_names, check_threshold, names_above
from .image_features import check_rows
from .text_cache import TextFeatureCache

_CHUNK = 256  # texts in a pass, whose activations are held


@dataclass(frozen=True, kw_only=True)
class _TextScorer(Scorer):
    """Scorer of many names by their text features (K, d); it finds the best names without a matrix (B, K).

    Attributes:
        features: function that returns the features (B, d) of each test view of images.
        logits: function from these features and text features (n, d) to logits (B, n).
    """

    features: Callable[[Views], list[Tensor]]
    logits: Callable[[Sequence[Tensor], Tensor], Tensor]
    text: Tensor

    def best(self, views: Views, k: int) -> tuple[Tensor, Tensor, Tensor]:
        found = self.features(views)
        values, numbers, shares = best_names(partial(self.logits, found), self.text, len(found[0]), k)
        return values, numbers, values.sigmoid() if self.multi_label else shares


class ZeroShotClassifier(Classifier):
    """Classifier of images by any class names: CLIP, SigLIP or another dual encoder, tuned or not.

    Args:
        model: a dual encoder such as `CLIPModel` or `SiglipModel`, or a `PeftModel` around one.
        processor: its processor, such as `CLIPProcessor`.
        template: text around a class name. Default: the adapter's own, else "a photo of a {}.".
        class_texts: texts of some classes, such as descriptions, in place of the template: a dict from a name to a
            list, see [`~peft_ncgeo.GeometryTrainer`]. Default: the texts that the adapter was trained with.

    Raises:
        TypeError, ValueError: the model reads no text or its features are not known, the processor has no tokenizer
            or no image processor, or `template` or `class_texts` do not fit.

    Text features of the last 64 lists of names (at most 512 MiB) are kept until an adapter's weights or the active
    adapter change. Several threads may use one classifier, but not while the model is trained or its adapters are
    switched.

    Example:

    ```python
    classifier = ZeroShotClassifier.from_pretrained("user/adapter")
    classifier.predict(images, class_names=["red panda", "snow leopard"])
    classifier.predict(images)  # the classes of the adapter's training
    classifier.predict_dataset("photos", num_workers=4)  # a table
    ```
    """

    def __init__(
        self, model: nn.Module, processor: Any, template: str | None = None, class_texts: ClassTexts | None = None
    ) -> None:
        if not reads_text(model):
            raise ValueError(
                f"{type(unwrap(model)).__name__} gives no text features, so it cannot read class names; pass a "
                "CLIP-like model."
            )
        check_encoders(model)
        check_adapter_weights(model)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise TypeError(
                "processor must hold a tokenizer and an image processor, as CLIPProcessor and SiglipProcessor do, got "
                f"{type(processor).__name__}; pass AutoProcessor.from_pretrained(...) of the model."
            )
        if template is not None:
            check_template(template)
        self.model, self.processor = model.eval(), processor
        self._template = template
        self._class_texts = None if class_texts is None else list_class_texts(class_texts)
        self._cache = TextFeatureCache()

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        base_model: nn.Module | str | None = None,
        processor: Any = None,
        template: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        class_texts: ClassTexts | None = None,
    ) -> ZeroShotClassifier:
        """Load an adapter (folder or Hub repository) onto its base model, or onto `base_model`.

        The default processor is the one saved beside the adapter, else the base model's. `revision` and `token` are
        for the Hub. See [`~peft_ncgeo.hub.load_adapter`] for the errors.
        """
        folder = fetch_adapter(repo_id, revision, token)
        with unchanged_on_error(base_model):
            model = load_adapter(folder, base_model, token=token)
            processor = processor or find_processor(model, folder, token=token)
            if processor is None:
                raise ValueError(
                    f"No processor beside the adapter in {repo_id} nor with its base model; pass processor."
                )
            return cls(model, processor, template, class_texts)

    @property
    def template(self) -> str:
        """Text around a class name, as it is used now."""
        return self._template or active_text_setting(self.model).template or DEFAULT_TEMPLATE

    @property
    def class_texts(self) -> dict[str, tuple[str, ...]]:
        """Texts that are used now in place of the template, by class name."""
        return dict(active_text_setting(self.model).class_texts if self._class_texts is None else self._class_texts)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that the active adapter was trained on; empty if they are not known."""
        return list(active_text_setting(self.model).class_names)

    @property
    def _is_multi_label(self) -> bool:
        """True if the active adapter was trained on images with any number of labels."""
        return active_text_setting(self.model).multi_label

    def predict_proba(
        self,
        images: Any,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        activation: str | None = None,
        num_test_views: int = 1,
    ) -> Tensor:
        """Return class probabilities, `softmax_k(exp(logit_scale) * cos(f_i, g_k))`: (N, K) float32 on the CPU.

        An adapter that was trained with [`~peft_ncgeo.losses.MultiLabelLoss`] gives each class a sigmoid of its own.

        Args:
            images: paths, PIL images or uint8 arrays (H, W, 3) or (H, W): one, a list, or a generator.
            class_names: K names. Default: those of the classes that the adapter was trained on.
            activation: "softmax": exactly one of the classes is right; works for every model. "sigmoid": each class
                alone is right or wrong, `sigmoid(exp(logit_scale) * cos(f_i, g_k) + logit_bias)`, as SigLIP and
                multi-label adapters were trained, and as Transformers' pipeline shows SigLIP's scores. Default:
                "sigmoid" for a multi-label adapter, else "softmax".
            num_test_views: 1, or 5: the logits are the mean over five crops, the corners and the centre of an image,
                see [`~peft_ncgeo.GeometryTrainingArguments`].

        Raises:
            TypeError, ValueError: there are fewer than two names, or [`class_prompts`] refuses them; an input is not
                an image or cannot be read (the message gives its number and path); features or `logit_scale` are not
                finite; or `activation` is unknown, or "sigmoid" for a model without `logit_bias`.
        """
        if activation not in (None, "softmax", "sigmoid"):
            raise ValueError(f"activation={activation!r} must be 'softmax' or 'sigmoid'.")
        if activation is None:
            activation = "sigmoid" if self._is_multi_label else "softmax"
        if activation == "sigmoid" and logit_bias(self.model) is None:
            raise ValueError(
                f"{type(unwrap(self.model)).__name__} has no logit_bias, so its scores are not probabilities of "
                "single classes; use activation='softmax' (predict names one class), or train with MultiLabelLoss."
            )
        logits = self._scores(*self._asked(images, class_names, batch_size, num_test_views))
        return (logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=-1)).cpu()

    def top_k(
        self,
        images: Any,
        class_names: Sequence[str] | None = None,
        k: int = 5,
        batch_size: int = 64,
        num_test_views: int = 1,
    ) -> list[list[tuple[str, float]]]:
        """Return the k most probable names of each image with their probabilities, the most probable first.

        The probabilities are those of [`predict_proba`] over all K names, but no matrix (N, K) is kept in memory.

        Args:
            k: number of names for each image; all K if there are fewer.
            images, class_names, batch_size, num_test_views: see [`predict_proba`].

        Raises:
            ValueError: `k` is less than 1, or as [`predict_proba`] does.
        """
        return self._top_k(*self._asked(images, class_names, batch_size, num_test_views), k)

    def predict(
        self,
        images: Any,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        num_test_views: int = 1,
    ) -> list[str]:
        """Return the most probable name for each image; see [`predict_proba`]. No matrix (N, K) is kept in memory."""
        return self._predict(*self._asked(images, class_names, batch_size, num_test_views))

    def _asked(
        self, images: Any, class_names: Sequence[str] | None, batch_size: int, num_test_views: int
    ) -> tuple[Scorer, Iterator[Views]]:
        batches = self._batches(images, batch_size, num_test_views)
        return self._scorer(class_names), batches

    def _scorer(self, class_names: Sequence[str] | None) -> Scorer:
        names = self._names(class_names)
        text = self.text_features(names)
        return _TextScorer(
            names=names,
            scores=lambda views: self._logits(self._features(views), text),
            features=self._features,
            logits=self._logits,
            text=text,
            multi_label=self._is_multi_label,
        )

    def _image_processor(self) -> Any:
        return self.processor.image_processor

    def _features(self, views: Views) -> list[Tensor]:
        """Return the unnormalized features (B, d) of each view."""
        with one_at_a_time(self.model):
            return [encode_images(self.model, **image_inputs(view, self._device)) for view in views]

    def _logits(self, views: Sequence[Tensor], text: Tensor) -> Tensor:
        """Return the logits (B, K) of images, the mean over the features (B, d) of their views."""
        scale, bias = logit_scale(self.model), logit_bias(self.model)
        return torch.stack([cosine_logits(features, text, scale, bias).float() for features in views]).mean(0)

    def predict_labels(
        self,
        images: Any,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        num_test_views: int = 1,
        threshold: float = 0.5,
    ) -> list[list[str]]:
        """Return the names of all classes in each image, none to K, the most probable first.

        Args:
            threshold: smallest probability of [`predict_proba`] with `activation="sigmoid"` at which a class counts
                as present.

        Raises:
            ValueError: the model's scores are not probabilities of single classes, as it is neither SigLIP nor tuned
                with [`~peft_ncgeo.losses.MultiLabelLoss`]; or as in [`predict_proba`].
        """
        names, threshold = self._names(class_names), check_threshold(threshold)
        return names_above(self.predict_proba(images, names, batch_size, "sigmoid", num_test_views), names, threshold)

    def _names(self, class_names: Sequence[str] | None) -> list[str]:
        if class_names is None and not self.class_names:
            raise ValueError("The classes of the adapter's training are not known; pass class_names.")
        return self.class_names if class_names is None else list_names(class_names)

    @torch.no_grad()
    def text_features(self, class_names: Sequence[str]) -> Tensor:
        """Return unnormalized text features (K, d) of the names in the template, computed once for each list of names.

        Names are encoded 256 at a time, with a progress bar for long lists. Texts of a chunk are packed into shared
        rows, so the other names of the list change features by rounding.

        If the active adapter has trained rows for some classes, see [`~peft_ncgeo.training.train_stages`], these rows
        are returned for them.
        """
        names = tuple(list_names(class_names))
        if len(names) < 2:
            raise ValueError(f"Classification needs at least two class names, got {short_repr(list(names))}.")
        settings = (self.template, self.class_texts, self._device, next(self.model.parameters()).dtype)
        features = self._cache.get(names, self.model, settings, partial(self._encode, names))
        self.model.eval()  # every part: one may be in training mode although the whole is not
        return active_text_setting(self.model).put_rows(features, names)

    def _encode(self, names: Sequence[str]) -> Tensor:
        config = active_prompt_config(self.model)
        slots = config.num_text_tokens if config else 0
        texts = class_prompts(
            names, self.template, slots, self.processor.tokenizer, model=self.model, class_texts=self.class_texts
        )
        counts = texts.pop("counts", None)
        of_rows = list(names) if counts is None else [n for n, k in zip(names, counts, strict=True) for _ in range(k)]
        self.model.eval()  # only after the names are accepted
        features, starts = None, range(0, len(of_rows), _CHUNK)
        for start in tqdm(starts, desc="Encoding names", disable=len(starts) < 10):
            chunk = {name: rows[start : start + _CHUNK] for name, rows in texts.items()}
            if "attention_mask" in chunk:  # without padding beyond the chunk's longest text
                longest = int(chunk["attention_mask"].sum(1).max())
                chunk = {name: rows[:, :longest] for name, rows in chunk.items()}
            with one_at_a_time(self.model):
                part = encode_texts(self.model, **{name: rows.to(self._device) for name, rows in chunk.items()})
            check_rows(part, "text features of class", of_rows[start : start + _CHUNK])
            features = part.new_empty(len(of_rows), part.shape[1]) if features is None else features
            features[start : start + len(part)] = part
        assert features is not None  # there are at least two names
        return mean_directions(features, counts)

    @property
    def _device(self) -> Any:
        return execution_device(self.model)
