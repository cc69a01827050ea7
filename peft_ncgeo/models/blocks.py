"""Search for the layer norm before the MLP in every block of an image tower."""

from __future__ import annotations

from torch import nn

from . import timm_models
from .adapters import innermost, unwrap
from .families import find_family, list_families
from .towers import find_towers


def find_mlp_norms(model: nn.Module) -> list[str]:
    """Return, for each block of the image tower, the path of the layer norm before its MLP.

    The input of this norm is the residual x (B, L, d) itself, to which the block adds the output of its MLP:
    `x + MLP(LN(x))`, with a layer scale, dropout or drop path on the MLP's output if the family has them.

    Raises:
        ValueError: the model has no image tower whose blocks are known.
    """
    vision = find_towers(model).get("vision")
    names = [_mlp_norm(model.get_submodule(block)) for block in vision.layers] if vision else []
    if vision is None or not all(names):
        raise ValueError(
            f"The blocks of {type(unwrap(model)).__name__} are not known, so adapters have no place beside MLPs; use "
            f"timm's VisionTransformer, or one of {list_families(lambda family: family.mlp_norm)}."
        )
    return [f"{block}.{name}" for block, name in zip(vision.layers, names, strict=True)]


def _mlp_norm(block: nn.Module) -> str:
    block = innermost(block)
    if timm_models.is_plain_block(block):
        return "norm2"
    family = find_family(block)
    return family.mlp_norm if family is not None else ""
