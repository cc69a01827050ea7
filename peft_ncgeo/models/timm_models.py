"""Parts of timm's models, which Transformers wraps in a `TimmWrapperModel` or ...ForImageClassification."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters import innermost

# Blocks of a VisionTransformer; all attend over a set of tokens.
_BLOCKS = ("Block", "ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock")
_ONE_FEATURE = ("EfficientFormer", "EfficientFormerV2", "LevitDistilled", "SwiftFormer")  # for both of their heads


def find_heads(wrapper: Any) -> tuple[str, ...]:
    """Return the paths of a classification model's heads; several if the model combines their logits."""
    if not hasattr(wrapper, "num_labels"):
        return ()
    auxiliary = hasattr(wrapper.timm_model, "aux_head")  # of VOLO, which adds the largest logits of its tokens
    return (*find_last_modules(wrapper), *(["timm_model.aux_head"] if auxiliary else []))


def find_last_modules(wrapper: Any) -> tuple[str, ...]:
    """Return the paths of the modules that take a model's pooled feature, as timm's `get_classifier` returns them.

    In a model without classes they are identities. A model that only makes feature maps has none.
    """
    inner = wrapper.timm_model
    try:
        found = _listed(inner.get_classifier())
    except AttributeError:  # encoders have none, and some models without classes look for a part of an identity
        return ()
    paths = {id(module): path for path, module in wrapper.named_modules()}
    return tuple(paths[id(module)] for module in found if id(module) in paths)


def why_no_feature(wrapper: Any) -> str:
    """Return the reason why a model has no single pooled feature of an image, as words after its name, or ""."""
    count = len(find_last_modules(wrapper))
    if count > 1 and type(wrapper.timm_model).__name__ not in _ONE_FEATURE:
        return f"gives its {count} heads features that are not known to be the same"
    if not hasattr(wrapper, "num_labels") and not wrapper.config.do_pooling:
        return "gives tokens or maps alone, since its config says do_pooling=False"
    if (wrapper.config.model_args or {}).get("global_pool") == "":
        return "gives tokens or maps alone, since its config says global_pool=''"
    return "" if count else "does not name the module that its pooled feature enters"


def _listed(found: Any) -> list[nn.Module]:
    if isinstance(found, tuple | list | nn.ModuleList):
        return [module for part in found for module in _listed(part)]
    # the whole head of Sequencer, which pools too
    return [found.fc if type(found).__name__ == "ClassifierHead" else found]


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the blocks of a plain VisionTransformer, or none for any other model of timm.

    Subclasses of it are not accepted, since they place or read tokens in other ways.
    """
    if not _is(module, "vision_transformer", "VisionTransformer"):
        return ()
    blocks = list(module.blocks.named_children())  # type: ignore[union-attr]
    known = all(_is(innermost(block), "vision_transformer", *_BLOCKS) for _, block in blocks)
    return tuple(f"blocks.{name}" for name, _ in blocks) if known else ()


def is_plain_block(block: nn.Module) -> bool:
    """Return True for the block of a VisionTransformer that computes `x + MLP(norm2(x))` in its second half."""
    return _is(block, "vision_transformer", "Block")


def find_convolutions(module: nn.Module) -> list[str]:
    """Return the names of the convolutions larger than 1x1 in the stages of a plain ResNet; none for other models."""
    if not _is(module, "resnet", "ResNet"):
        return []
    found = []
    for name, stage in module.named_children():
        for number, block in stage.named_children() if name.startswith("layer") else ():
            if not _is(block, "resnet", "BasicBlock", "Bottleneck"):
                return []
            layers = [(layer, innermost(child)) for layer, child in block.named_children()]
            convolutions = [(layer, child) for layer, child in layers if isinstance(child, nn.Conv2d)]
            found += [f"{name}.{number}.{layer}" for layer, child in convolutions if max(child.kernel_size) > 1]
    return found


def _is(module: nn.Module, file: str, *names: str) -> bool:
    """Return True if a module's class is one of these classes of timm, without importing timm."""
    kind = type(module)
    return kind.__module__ == f"timm.models.{file}" and kind.__name__ in names
