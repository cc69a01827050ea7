"""CoPA as a value of `head` in `adapt`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CoPA:
    """CoPA: a head for images and one for prototypes, the default of [`~peft_ncgeo.adapt`].

    It reads no class names, so any vision backbone can be used. Its settings are `steps`, `lr`, `weight_decay`,
    `optimizer` and `adapter_lr` of `adapt`, and those of [`~peft_ncgeo.CoPAConfig`].

    Reference: H. Tian et al., NeurIPS 2024, arXiv 2410.12474.
    """
