"""Config of bottleneck adapters beside the MLPs of an image tower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig, PeftType

from ...validation import check_int, check_names


@dataclass
class AdaptFormerConfig(PeftConfig):
    r"""Config of AdaptFormer (`NCGEO_ADAPTFORMER`), a bottleneck beside the MLP in every block of an image tower.

    With the residual x (B, L, d) before the MLP and its layer norm LN,

    .. math:: x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x))
              + s \, W_2 \, \mathrm{ReLU}(W_1 \mathrm{LN}_a(x) + b_1) + s \, b_2

    LN_a is the adapter's own layer norm, `W_1` is (r, d), `W_2` is (d, r), and the number s is trained. Each block has
    `2 d r + 3 d + r + 1` parameters. `W_1` starts from `N(0, 1 / 3d)`, which is kaiming-normal with the slope sqrt(5)
    of LIFT's code; `W_2` and the biases start at 0, and s at 1, so that an untrained model equals the base model.
    AdaptFormer's paper fixes s = 0.1.

    Some blocks scale the output of the MLP or drop it at random (DINOv2, DINOv3, BEiT). The adapter's term is added
    after that, so neither layer scale nor drop path changes it.

    Args:
        bottleneck_dim: r. Default: `2 ** max(0, int(log2(K / 2L)))` for K classes and L blocks, as in LIFT, so that
            the adapters have fewer parameters than a linear head.
        num_classes: K, used only for `bottleneck_dim`. Default: the number of outputs of the model's head.
        modules_to_save: modules trained and saved as a whole, such as the head, `["classifier"]`.

    Raises:
        ValueError: a value is out of range; the model's blocks are not known; or `bottleneck_dim` and `num_classes`
            are missing and the model has no head.

    Reference: S. Chen, C. Ge, Z. Tong, J. Wang, Y. Song, J. Wang, P. Luo, AdaptFormer: Adapting Vision Transformers
    for Scalable Visual Recognition, NeurIPS 2022, arXiv 2205.13535. LIFT: J.-X. Shi, T. Wei, Z. Zhou, J.-J. Shao,
    X.-Y. Han, Y.-F. Li, Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts, ICML 2024,
    arXiv 2309.10019.

    Example:

    ```python
    options = {"head": "cosine", "init": "texts", "processor": processor, "projected": False}
    classifier = ImageClassifier.from_backbone(clip, names, **options)
    model = get_peft_model(classifier, AdaptFormerConfig(modules_to_save=["classifier"]))
    ```
    """

    # PEFT reads this attribute. Modules are found by structure: a path here would store today's layout in files.
    target_modules: ClassVar[None] = None

    bottleneck_dim: int | None = field(default=None, metadata={"help": "Width of the bottleneck."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes, from which the default of bottleneck_dim follows."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved as a whole beside the adapters."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NCGEO_ADAPTFORMER"]
        if self.bottleneck_dim is not None:
            self.bottleneck_dim = check_int("bottleneck_dim", self.bottleneck_dim, least=1, most=10**5)
        if self.num_classes is not None:
            self.num_classes = check_int("num_classes", self.num_classes, least=1, most=10**7)
        self.modules_to_save = check_names("modules_to_save", self.modules_to_save)


def default_width(classes: int, blocks: int) -> int:
    """Return LIFT's width of the bottleneck: the largest power of 2 up to `classes / (2 blocks)`, or 1."""
    return 1 << max(0, (classes // (2 * blocks)).bit_length() - 1)
