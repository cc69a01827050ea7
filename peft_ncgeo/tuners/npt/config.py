"""Config of prompts, with published settings as presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftType

from ..prompt_config import PromptConfig


@dataclass
class NPTConfig(PromptConfig):
    """Config of deep text and vision prompts for CLIP, SigLIP, ViT, DINO and others (`NCGEO_NPT`).

    This config covers CoOp, VPT, IVLP (the prompts of PromptSRC), MaPLe and Prompt-OT.
    [`~peft_ncgeo.tuners.PromptConfig`] explains the fields, and where prompts stand among a model's tokens. All other
    weights stay frozen, including `logit_scale`.

    Example:

    ```python
    model = get_peft_model(CLIPModel.from_pretrained("openai/clip-vit-base-patch16"), NPTConfig.prompt_ot())
    model.print_trainable_parameters()  # 61,440
    ```
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NCGEO_NPT"]

    @classmethod
    def coop(cls, **fields: Any) -> NPTConfig:
        """Return CoOp's config (arXiv 2109.01134): 16 text vectors at the input, random start. `fields` change it."""
        return cls(**{"num_text_tokens": 16, **fields})

    @classmethod
    def vpt(cls, **fields: Any) -> NPTConfig:
        """Return VPT-deep's config (arXiv 2203.12119): 8 vectors in 12 layers (our reading). `fields` change it."""
        return cls(**{"num_vision_tokens": 8, "vision_depth": 12, **fields})

    @classmethod
    def ivlp(cls, **fields: Any) -> NPTConfig:
        """Return IVLP's config (arXiv 2307.06948): 4 + 4 independent vectors in 9 layers. `fields` change it."""
        return cls(**{**_FOUR_AND_FOUR, "text_depth": 9, "vision_depth": 9, **fields})

    @classmethod
    def maple(cls, **fields: Any) -> NPTConfig:
        """Return MaPLe's config (arXiv 2210.03117): 2 + 2 coupled vectors in 9 layers. `fields` change it."""
        own = {"num_text_tokens": 2, "num_vision_tokens": 2, "text_depth": 9, "vision_depth": 9}
        return cls(**{**own, "coupling": "coupled", "text_init": "a photo", **fields})

    @classmethod
    def npt(cls, **fields: Any) -> NPTConfig:
        """Return NPT's config (arXiv 2306.15955): MaPLe's prompts (our reading). `fields` change it."""
        return cls.maple(**fields)

    @classmethod
    def prompt_ot(cls, **fields: Any) -> NPTConfig:
        """Return Prompt-OT's config (arXiv 2503.08906): 4 + 4 vectors in 12 layers. `fields` change it."""
        return cls(**{**_FOUR_AND_FOUR, "text_depth": 12, "vision_depth": 12, **fields})


_FOUR_AND_FOUR: dict[str, Any] = {"num_text_tokens": 4, "num_vision_tokens": 4, "text_init": "a photo of a"}
