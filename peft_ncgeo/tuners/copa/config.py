"""Config of a head for images and a head for prototypes on a few-shot backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig, PeftType

from ...geometry.contrast import TEMPERATURE, URL_TEMPERATURE, check_temperature
from ...validation import check_bool, check_int, check_names


@dataclass
class CoPAConfig(PeftConfig):
    r"""Config of heads for few-shot classification by the nearest prototype (`NCGEO_COPA`), on any vision backbone.

    With image features x_i and prototypes `P_c` (`P_c` is the mean feature of class c's support images),

    .. math:: e_i = \mathrm{unit}(x_i \Theta_I), \quad p_c = \mathrm{unit}(P_c \Theta_P), \quad
              z_{ic} = e_i \cdot p_c / \tau

    Both heads are d x d, without bias, and start as the identity, so an untrained model predicts the class of the
    nearest prototype by cosine. [`~peft_ncgeo.adapt`] trains them on a support set.

    Theta_I follows the module that outputs the pooled feature, see [`~peft_ncgeo.models.towers.find_pooling`]: with
    the adapter on, the model itself outputs the transformed feature. (The head of `CLIPForImageClassification` reads
    another feature.) Theta_P is used by `adapt` and its classifier.

    Args:
        num_features: d. Default: the model's.
        shared: True: use one head for both, as in URL; `adapt` then minimises URL's loss, the cross-entropy of `z`.
        residual_adapters: True: add residual maps to the backbone, `f(h) + h A`, as in TSA: to every attention and MLP
            of a transformer (our reading), or as a 1x1 convolution to every 3x3 convolution of a ResNet. The maps
            start at 1e-4 times the identity and are trained together with the heads.
        temperature: tau, 1e-6 to 1e6. Default: exp(-2), or URL's 0.1 for a shared head.
        modules_to_save: modules trained and saved as a whole if a trainer trains the heads; `adapt` ignores them.

    Raises:
        ValueError: a value is out of range, the backbone's pooled feature is not known, the backbone has no modules
            for residual adapters, or `num_features` is not the model's.

    Reference: H. Tian, F. Liu, Z. Zhou, T. Liu, C. Zhang, B. Han, Mind the Gap Between Prototypes and Images in
    Cross-domain Finetuning, NeurIPS 2024, arXiv 2410.12474. URL: W.-H. Li, X. Liu, H. Bilen, ICCV 2021,
    arXiv 2103.13841. TSA: the same authors, CVPR 2022, arXiv 2107.00358.

    Example:

    ```python
    model = get_peft_model(ViTModel.from_pretrained("facebook/dino-vits16"), CoPAConfig())
    classifier = adapt(model, images, labels)
    classifier.predict(others)
    ```
    """

    # PEFT reads this attribute. Modules are found by structure: a path here would store today's layout in files.
    target_modules: ClassVar[None] = None

    num_features: int | None = field(default=None, metadata={"help": "Width of the pooled feature."})
    shared: bool = field(default=False, metadata={"help": "One head for images and prototypes, as in URL."})
    residual_adapters: bool = field(default=False, metadata={"help": "Residual maps in the backbone, as in TSA."})
    temperature: float | None = field(default=None, metadata={"help": "Divides the cosines."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved as a whole beside the heads."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NCGEO_COPA"]
        if self.num_features is not None:
            self.num_features = check_int("num_features", self.num_features, least=1, most=10**6)
        self.shared = check_bool("shared", self.shared)
        self.residual_adapters = check_bool("residual_adapters", self.residual_adapters)
        self.modules_to_save = check_names("modules_to_save", self.modules_to_save)
        if self.temperature is None:
            self.temperature = URL_TEMPERATURE if self.shared else TEMPERATURE
        self.temperature = check_temperature(self.temperature)
