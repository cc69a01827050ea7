"""A method in its model, and all that the model says, for the tests of what PEFT promises."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import SiglipModel

from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.text_encoder import text_features
from peft_ncgeo.models.towers import find_towers
from peft_ncgeo.tuners.copa import CoPALayer

from ..cases import Tuner
from ..conftest import pixels, texts


def outputs(model, slots: int = 4) -> torch.Tensor:
    """Everything the model computes from images and texts, as one row, and what an adapter does to prototypes."""
    moved = torch.zeros(1)
    for heads in [layer.heads for layer in model.modules() if isinstance(layer, CoPALayer)]:
        if heads:
            moved = (heads[1] - torch.eye(len(heads[1]))).sum()[None]
    out = model_outputs(model, slots)
    return torch.cat([out, moved.to(out.dtype)])


def model_outputs(model, slots: int) -> torch.Tensor:
    inputs = texts(max(slots, 4))
    towers = find_towers(unwrap(model))
    if hasattr(unwrap(model), "get_image_features"):
        image = encode_images(model, pixels()).flatten()
        if isinstance(unwrap(model), SiglipModel):
            return image
        return torch.cat([image, text_features(model, **inputs).flatten()])
    images = pixels().to(unwrap(model).dtype)  # ResNet does not cast them itself
    out = model(**inputs) if "text" in towers else model(pixel_values=images)
    names = ("logits", "text_embeds", "image_embeds", "pooler_output", "last_hidden_state")
    found = [out[name].flatten() for name in names if out.get(name) is not None]
    return torch.cat(found[:1] if "logits" in out else found)


def adapted(case: Tuner, seed: int = 1, build=None, name: str = "default"):
    torch.manual_seed(seed)
    model = get_peft_model((build or case.build)(), case.config(), adapter_name=name)
    far = 0.05 if case.prefix == "ncgeo_copa_" else 0.3  # so that equality means something; d x d maps act d times
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * far)
    return model.eval()


def assert_same(got: torch.Tensor, expected: torch.Tensor, case: Tuner) -> None:
    """Bit-equal; coupled prompts pass through a matrix product whose last bit depends on where the weights lie."""
    if getattr(case.config(), "coupling", None) == "coupled":
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(got, expected)
