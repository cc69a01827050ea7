"""Backbones without a head, and timm's models."""

from __future__ import annotations

from importlib.util import find_spec

import transformers as T

from .specs import K, Spec, V


def timm_spec(arch, **args):
    def cfg():
        c = T.TimmWrapperConfig(architecture=arch, model_args=args, num_labels=K)
        c.pretrained_cfg = {
            "input_size": [3, 32, 32],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": K,
        }
        return c

    return cfg


def backbones() -> list[Spec]:
    found: list[Spec] = []

    def add(name, cls, config, **others):
        found.append(Spec(name, cls, "backbone", config, **others))

    add("ViTModel", "ViTModel", lambda: T.ViTConfig(**V))
    add("ViTMAEModel", "ViTMAEModel", lambda: T.ViTMAEConfig(**V, mask_ratio=0.0))
    add(
        "Dinov2Model",
        "Dinov2Model",
        lambda: T.Dinov2Config(**{k: v for k, v in V.items() if k != "intermediate_size"}, mlp_ratio=2),
    )
    add(
        "Dinov2Backbone",
        "Dinov2Backbone",
        lambda: T.Dinov2Config(
            **{k: v for k, v in V.items() if k != "intermediate_size"}, mlp_ratio=2, out_features=["stage2", "stage3"]
        ),
    )
    add(
        "Dinov2Backbone (8x8 patches, as 16x16 of real ones)",
        "Dinov2Backbone",
        lambda: T.Dinov2Config(
            **{**{k: v for k, v in V.items() if k != "intermediate_size"}, "patch_size": 8, "hidden_size": 64},
            mlp_ratio=2,
            out_features=["stage3"],
        ),
    )
    add(
        "Dinov2WithRegistersBackbone",
        "Dinov2WithRegistersBackbone",
        lambda: T.Dinov2WithRegistersConfig(
            **{k: v for k, v in V.items() if k != "intermediate_size"},
            mlp_ratio=2,
            num_register_tokens=2,
            out_features=["stage3"],
        ),
    )
    add("DINOv3ViTModel", "DINOv3ViTModel", lambda: T.DINOv3ViTConfig(**V, num_register_tokens=2))
    add(
        "DINOv3ViTBackbone",
        "DINOv3ViTBackbone",
        lambda: T.DINOv3ViTConfig(**V, num_register_tokens=2, out_features=["stage3"]),
    )
    add(
        "DINOv3ConvNextModel",
        "DINOv3ConvNextModel",
        lambda: T.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32),
    )
    add("IJepaModel", "IJepaModel", lambda: T.IJepaConfig(**V))
    add("BeitModel", "BeitModel", lambda: T.BeitConfig(**V, use_relative_position_bias=True, drop_path_rate=0.0))
    add(
        "SwinModel",
        "SwinModel",
        lambda: T.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.0,
        ),
    )
    add(
        "ConvNextModel",
        "ConvNextModel",
        lambda: T.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32),
    )
    add(
        "RegNetModel",
        "RegNetModel",
        lambda: T.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], groups_width=8),
    )
    add(
        "BitModel",
        "BitModel",
        lambda: T.BitConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_groups=4),
    )
    add(
        "EfficientNetModel",
        "EfficientNetModel",
        lambda: T.EfficientNetConfig(
            image_size=32,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            kernel_sizes=[3, 3],
            in_channels=[32, 16],
            out_channels=[16, 24],
            strides=[1, 2],
            num_block_repeats=[1, 1],
            expand_ratios=[1, 6],
            hidden_dim=1280,
        ),
    )
    add("CLIPVisionModel", "CLIPVisionModel", lambda: T.CLIPVisionConfig(**V))
    add(
        "CLIPVisionModelWithProjection",
        "CLIPVisionModelWithProjection",
        lambda: T.CLIPVisionConfig(**V, projection_dim=24),
    )
    add("MetaClip2VisionModel", "MetaClip2VisionModel", lambda: T.MetaClip2VisionConfig(**V))
    add("SiglipVisionModel", "SiglipVisionModel", lambda: T.SiglipVisionConfig(**V))
    add(
        "Siglip2VisionModel",
        "Siglip2VisionModel",
        lambda: T.Siglip2VisionConfig(**{k: v for k, v in V.items() if k != "image_size"}, num_patches=16),
    )
    add("Aimv2VisionModel", "Aimv2VisionModel", lambda: T.Aimv2VisionConfig(**V))
    add(
        "Tipsv2VisionModel",
        "Tipsv2VisionModel",
        lambda: T.Tipsv2VisionConfig(**{k: v for k, v in V.items() if k != "intermediate_size"}, mlp_ratio=2),
    )
    add(
        "DepthAnything (Dinov2 backbone)",
        "DepthAnythingForDepthEstimation",
        lambda: T.DepthAnythingConfig(
            backbone_config=T.Dinov2Config(
                **{k: v for k, v in V.items() if k != "intermediate_size"},
                mlp_ratio=2,
                out_features=["stage1", "stage2", "stage3"],
                reshape_hidden_states=False,
                apply_layernorm=True,
            ),
            reassemble_hidden_size=32,
            patch_size=8,
            neck_hidden_sizes=[8, 8, 8],
            reassemble_factors=[2, 1, 0.5],
            fusion_hidden_size=8,
            head_hidden_size=8,
        ),
    )

    def add_classifier(name, cls, config):
        found.append(Spec(name, cls, "classifier", config))

    if find_spec("timm"):
        add_classifier(
            "TimmWrapper (timm MobileNetV3, head `classifier`)",
            "TimmWrapperForImageClassification",
            timm_spec("tf_mobilenetv3_small_minimal_100"),
        )
        resnet = timm_spec("resnet10t", channels=(16, 32, 64, 128), stem_width=8)
        add_classifier("TimmWrapper (timm ResNet)", "TimmWrapperForImageClassification", resnet)
        add_classifier(
            "TimmWrapper (timm ViT)",
            "TimmWrapperForImageClassification",
            timm_spec("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2),
        )
        add("TimmWrapperModel (timm ResNet)", "TimmWrapperModel", resnet)
        add(
            "TimmWrapperModel (timm ViT)",
            "TimmWrapperModel",
            timm_spec("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2),
        )
    return found
