"""Pooled features of a vision backbone for few-shot classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..data.processors import find_processor, image_processor
from ..data.reading import KINDS, list_images, rgb_images
from ..models.adapters import check_adapter_weights, evaluation_mode, unwrap
from ..models.devices import execution_device, one_at_a_time
from ..models.image_encoder import check_image_inputs, encode_images, image_inputs
from ..models.substitution import Recorder, substitute
from ..models.towers import check_encoders, find_pooling
from ..tuners.copa import CoPALayer
from ..validation import OF_THE_MACHINE, check_int, one_line, short_repr


class ImageFeatures(nn.Module):
    """Backbone as a function from pixels (B, C, H, W) to pooled features (B, d), in float32 or wider.

    See [`~peft_ncgeo.models.towers.find_pooling`] for the place where features are read. The heads of a
    [`~peft_ncgeo.CoPAConfig`] are left out; every other adapter is applied.

    Args:
        model: a vision backbone with any head on top, a CLIP, or a `PeftModel` around one.
        processor: its image processor, or a processor that holds one. Default: loaded from the base model's name or
            path when the first images are not a tensor.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.pooling = find_pooling(unwrap(model))
        check_adapter_weights(model)

    def forward(
        self, pixel_values: Tensor, modules: Mapping[str, nn.Module] | None = None, **others: Tensor
    ) -> Tensor:
        """Return the features of pixels.

        Args:
            modules: module path in the model without PEFT's wrapper -> the module to use there in this pass.
            others: tensors that the model's image processor returns in addition to the pixels.

        Raises:
            ValueError: an input is missing, or the model does not accept pixels of this shape.
        """
        model, path = unwrap(self.model), self.pooling.path
        check_image_inputs(model, others)
        pooling = model.get_submodule(path)
        if isinstance(pooling, CoPALayer):
            pooling = pooling.base_layer
        recorder = Recorder(pooling)
        view = substitute(model, {**(modules or {}), path: recorder})
        self._pass(getattr(view, "get_image_features", view), pixel_values, others)  # a whole CLIP needs texts too
        features = self.pooling.read(recorder.only("entered" if self.pooling.is_input else "left"))
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def _pass(self, run: Callable[..., Any], pixel_values: Tensor, others: Mapping[str, Tensor]) -> Any:
        """Return what `run` returns for inputs on the model's device."""
        model = unwrap(self.model)
        first, device = next(model.parameters()), execution_device(model)
        try:
            with one_at_a_time(model):
                moved = {name: value.to(device) for name, value in others.items()}
                return run(pixel_values=pixel_values.to(device, first.dtype), **moved)
        except OF_THE_MACHINE:
            raise
        except (RuntimeError, ValueError) as error:  # torch about channels, Transformers about sizes
            shape = tuple(pixel_values.shape)
            raise ValueError(
                f"{type(model).__name__} cannot process pixels of shape {shape}: {one_line(error)}"
            ) from error

    def inputs(self, images: Any, first: int = 0) -> dict[str, Tensor]:
        """Return `pixel_values` (N, C, H, W) of images or pixels, and the other tensors that the model needs.

        Args:
            first: number of the first image, for error messages.

        Raises:
            TypeError, ValueError: an input is of another kind, or no processor for images is known.
        """
        images = self.listed(images)
        if isinstance(images, Tensor):
            return {"pixel_values": images}
        rgb = rgb_images(images, first)
        return image_inputs(self.image_processor()(images=rgb, return_tensors="pt"))

    def listed(self, images: Any) -> list[Any] | Tensor:
        """Return one or several images as a list, without opening them; return pixels (N, C, H, W) unchanged.

        Raises:
            TypeError, ValueError: an input is of another kind, or empty.
        """
        if isinstance(images, Tensor):
            check_pixels(images)
        else:
            images = list_images(images, f"{KINDS}, or pixels (N, C, H, W)")
        if not len(images):
            raise ValueError("There are no images; pass at least one.")
        return images

    @torch.no_grad()
    def embed(self, images: Any, batch_size: int = 64, modules: Mapping[str, nn.Module] | None = None) -> Tensor:
        """Return features (N, d) of the images or pixels, batch by batch, with the model in evaluation mode.

        Args:
            modules: see [`forward`].
        """
        batch_size = check_int("batch_size", batch_size, least=1)
        images = self.listed(images)
        starts = range(0, len(images), batch_size)
        bar = tqdm(starts, desc="Embedding", unit="batch", leave=False, disable=len(starts) < 10)
        batches = (self.inputs(images[start : start + batch_size], start) for start in bar)
        with evaluation_mode(self.model):
            return torch.cat([self(**batch, modules=modules) for batch in batches])

    def embed_with_gradient(self, inputs: Mapping[str, Tensor], batch_size: int = 64) -> Tensor:
        """Return features with gradients; keep the activations of one batch at a time and recompute the others."""
        if len(inputs["pixel_values"]) <= batch_size:
            return self(**inputs)
        parts = zip(*(value.split(batch_size) for value in inputs.values()), strict=True)
        batches = (dict(zip(inputs, part, strict=True)) for part in parts)
        return torch.cat([checkpoint(self, use_reentrant=False, **batch) for batch in batches])

    def image_processor(self) -> Any:
        """Return the image processor; if none was given, load it from the base model's name or path.

        Raises:
            ValueError: none is found.
        """
        if self.processor is None:  # several threads may look for it; all find the same
            self.processor = find_processor(self.model, images_only=True)
            if self.processor is None:
                raise ValueError("No image processor is found with the base model; pass processor.")
        return image_processor(self.processor)


class ProjectedFeatures(ImageFeatures):
    """Dual encoder as a function from pixels (B, C, H, W) to the features (B, d) that are compared with texts.

    Features are not normalized.

    Every adapter is applied. Arguments are those of [`ImageFeatures`].
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        nn.Module.__init__(self)
        self.model, self.processor = model, processor
        check_encoders(model)
        check_adapter_weights(model)

    def forward(
        self, pixel_values: Tensor, modules: Mapping[str, nn.Module] | None = None, **others: Tensor
    ) -> Tensor:
        """Return the features of pixels; see [`ImageFeatures.forward`]. `modules` are not replaced."""
        features: Tensor = self._pass(partial(encode_images, self.model), pixel_values, others)
        return features.to(torch.promote_types(features.dtype, torch.float32))


def check_pixels(pixels: Tensor) -> None:
    """Raise a ValueError if a tensor does not look like the output of an image processor."""
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise ValueError(
            "Pixels must be floating-point numbers (N, C, H, W) as an image processor gives them, got "
            f"{pixels.dtype} of shape {tuple(pixels.shape)}."
        )


def check_rows(rows: Tensor, what: str, names: Sequence[Any]) -> None:
    """Raise an error that names the first row (of N, d) that is not finite; argmax would choose class 0 for it."""
    wrong = (~rows.isfinite().all(-1)).nonzero()
    if len(wrong):
        raise ValueError(
            f"The {what} {short_repr(names[int(wrong[0])])} are not finite; the pixels, or the weights of the model "
            "or its adapter, are damaged."
        )
