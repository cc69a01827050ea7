"""Check that towers are known to support prompts."""

from __future__ import annotations

from torch import nn

from .families import family_name, find_family, first_reason, list_families, reads_layers, why_no_texts
from .towers import Tower, parent_path

_REASONS = {"text": "no_texts", "vision": "no_prompts"}
_UNKNOWN = "is not known to treat prompts as it treats image tokens"


def check_prompts(model: nn.Module, kind: str, tower: Tower | None) -> None:
    """Raise an error if a model's text or vision tower is not known to support prompts.

    Args:
        kind: "text" or "vision".
        tower: the tower of this kind from [`~peft_ncgeo.models.towers.find_towers`].

    Raises:
        ValueError: the model is of a known family and has no such tower.
        NotImplementedError: the model is refused for another reason; the message gives it if it is known.
    """
    if kind == "text":
        reason = "" if tower is not None and _gives_features(model, tower) else why_no_texts(model)
        known = list_families(lambda family: family.text)
    else:
        reason = _why_no_vision_prompts(model, tower)
        known = list_families(lambda family: family.takes_prompts)
    if not reason:
        return
    name = type(model).__name__
    if hasattr(model, "timm_model"):
        name += f" (timm's {type(model.timm_model).__name__})"
    if tower is None and find_family(model) is not None and not first_reason(model.modules(), _REASONS[kind]):
        raise ValueError(f"{name} has no {kind} tower to prompt; set num_{kind}_tokens=0.")
    raise NotImplementedError(
        f"{name} {reason}, so it takes no {kind} prompts: set num_{kind}_tokens=0. LoRA and heads work on it; {kind} "
        f"towers that are known: {known}."
    )


def _gives_features(model: nn.Module, tower: Tower) -> bool:
    """Return True for a text tower with known rules of reading, whose pooled token is the feature of a text.

    Towers that pool at [CLS] are also used in models for other purposes, such as image-text matching.
    """
    if tower.reading is None:
        return False
    is_model = not parent_path(tower.embeddings)
    return bool(tower.reading.end_of_text or is_model or any(hasattr(m, "get_text_features") for m in model.modules()))


def _why_no_vision_prompts(model: nn.Module, tower: Tower | None) -> str:
    """Return the reason why a model takes no vision prompts, as words after the model's name, or ""."""
    if tower is None:
        return first_reason(model.modules(), "no_prompts") or _UNKNOWN
    path = parent_path(tower.embeddings)
    around = [model.get_submodule(path)]  # the tower and all its parents
    while path:
        path = parent_path(path)
        around.append(model.get_submodule(path))
    if any(reads_layers(module) for module in around):
        return "reads inner layers of its image tower, where prompts would leak into its feature maps"
    for module in around:
        family = find_family(module)
        # a user's own module may hold a tower, but an unknown model of Transformers may not
        if family is None and (module is around[0] or family_name(module) is not None):
            return _UNKNOWN
        if family is not None and not family.takes_prompts:
            return family.no_prompts or _UNKNOWN
    biased = any("relative_position" in name for name, _ in around[0].named_parameters())
    return "has relative position biases of a fixed size" if biased else ""
