"""Pooled features of a vision backbone, as few-shot classification reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..data.images import list_images, rgb_images
from ..data.processors import find_processor, image_processor
from ..models.adapters import check_adapter_weights, evaluation_mode, unwrap
from ..models.devices import execution_device, one_at_a_time
from ..models.substitution import Recorder, substitute
from ..models.towers import find_pooling
from ..tuners.copa import CoPALayer
from ..validation import OF_THE_MACHINE, reason, shown, whole_number


class ImageFeatures(nn.Module):
    """A backbone as a function of pixels alone: (B, C, H, W) to its pooled features (B, d), in float32 or wider.

    See [`~peft_ncgeo.models.towers.find_pooling`] for where they are read. The heads of a [`~peft_ncgeo.CoPAConfig`]
    are left out; every other adapter counts.

    Args:
        model: a vision backbone with any head on top, a CLIP, or a `PeftModel` around one.
        processor: its image processor, or a processor that holds one. Default: the one that lies where the model
            came from, looked for when the first image is no tensor.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.path, self.width = find_pooling(unwrap(model))
        check_adapter_weights(model)

    def forward(self, pixel_values: Tensor, modules: Mapping[str, nn.Module] | None = None) -> Tensor:
        """Pixels to features.

        Args:
            modules: path in the model without PEFT's wrapper -> what stands there in this pass.
        """
        model = unwrap(self.model)
        first, path = next(model.parameters()), self.path
        pooling = model.get_submodule(path)
        if isinstance(pooling, CoPALayer):
            pooling, path = pooling.base_layer, f"{path}.base_layer"
        recorder = Recorder(pooling)
        view = substitute(model, {**(modules or {}), path: recorder})
        run = getattr(view, "get_image_features", view)  # a whole CLIP would ask for texts
        try:
            with one_at_a_time(model):
                run(pixel_values=pixel_values.to(execution_device(model), first.dtype))
        except OF_THE_MACHINE:
            raise
        except (RuntimeError, ValueError) as error:  # torch's of channels, Transformers' of sizes
            shape = tuple(pixel_values.shape)
            raise ValueError(f"{type(model).__name__} takes no pixels of shape {shape}: {reason(error)}") from error
        features = recorder.only("left")
        # of all tokens the first; ResNet's are (B, d, 1, 1)
        features = features[:, 0] if features.dim() == 3 else features.flatten(1)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def pixels(self, images: Any, first: int = 0) -> Tensor:
        """Pixels (N, C, H, W) of one PIL image, several, or of a tensor that holds them already.

        Args:
            first: number of the first image, by which errors name one.

        Raises:
            TypeError, ValueError: something that is none of these, or images for which no processor is known.
        """
        images = self.listed(images)
        if isinstance(images, Tensor):
            return images
        rgb = rgb_images(images, first)
        return self._image_processor()(images=rgb, return_tensors="pt")["pixel_values"]

    def listed(self, images: Any) -> list[Image.Image] | Tensor:
        """One PIL image or several as a list, or pixels (N, C, H, W) as they are.

        Raises:
            TypeError, ValueError: something else, or none.
        """
        if not isinstance(images, Tensor):
            images = list_images(images, "PIL images or pixels (N, C, H, W)")
        elif images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                "Pixels must be floating-point numbers (N, C, H, W) as an image processor gives them, got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if not len(images):
            raise ValueError("There are no images.")
        return images

    @torch.no_grad()
    def embed(self, images: Any, batch_size: int = 64, modules: Mapping[str, nn.Module] | None = None) -> Tensor:
        """Features (N, d) of images as [`pixels`] takes them, batch by batch, the model in evaluation mode meanwhile.

        Args:
            modules: see [`forward`].
        """
        batch_size = whole_number("batch_size", batch_size, least=1)
        images = self.listed(images)
        starts = range(0, len(images), batch_size)
        bar = tqdm(starts, desc="Embedding", unit="batch", leave=False, disable=len(starts) < 10)
        batches = (self.pixels(images[start : start + batch_size], start) for start in bar)
        with evaluation_mode(self.model):
            return torch.cat([self(batch, modules) for batch in batches])

    def embed_with_gradient(self, pixel_values: Tensor, batch_size: int = 64) -> Tensor:
        """The same with gradients, keeping the activations of one batch at a time: others are computed again."""
        batches = pixel_values.split(batch_size)
        if len(batches) == 1:
            return self(pixel_values)
        return torch.cat([checkpoint(self, batch, use_reentrant=False) for batch in batches])

    def _image_processor(self) -> Any:
        if self.processor is None:  # several threads may look for it, and find the same
            self.processor = find_processor(self.model, images_only=True)
            if self.processor is None:
                raise ValueError("No image processor lies where the model came from; pass processor.")
        return image_processor(self.processor)


def check_rows(rows: Tensor, what: str, names: Sequence[Any]) -> None:
    """Refuse rows (N, d) that are not finite, naming the first: the best of them would be the first class."""
    wrong = (~rows.isfinite().all(-1)).nonzero()
    if len(wrong):
        raise ValueError(
            f"The {what} {shown(names[int(wrong[0])])} are not finite; the pixels, or the weights of the model or its "
            "adapter, are damaged."
        )
