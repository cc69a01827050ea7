"""Image classifiers."""

from __future__ import annotations

import transformers as T

from .specs import CLIPTOK, TX, K, Spec, V, clipcfg

LABELLED = {"num_labels": K}


def classifiers() -> list[Spec]:
    found: list[Spec] = []

    def add(name, cls, config, **others):
        found.append(Spec(name, cls, "classifier", config, **others))

    add("ViTForImageClassification", "ViTForImageClassification", lambda: T.ViTConfig(**V, **LABELLED))
    add("DeiTForImageClassification", "DeiTForImageClassification", lambda: T.DeiTConfig(**V, **LABELLED))
    add(
        "DeiTForImageClassificationWithTeacher",
        "DeiTForImageClassificationWithTeacher",
        lambda: T.DeiTConfig(**V, **LABELLED),
    )
    add(
        "Dinov2ForImageClassification",
        "Dinov2ForImageClassification",
        lambda: T.Dinov2Config(**{k: v for k, v in V.items() if k != "intermediate_size"}, mlp_ratio=2, **LABELLED),
    )
    add(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersForImageClassification",
        lambda: T.Dinov2WithRegistersConfig(
            **{k: v for k, v in V.items() if k != "intermediate_size"}, mlp_ratio=2, num_register_tokens=2, **LABELLED
        ),
    )
    add(
        "BeitForImageClassification (rel. pos. bias, as released)",
        "BeitForImageClassification",
        lambda: T.BeitConfig(**V, **LABELLED, use_relative_position_bias=True, drop_path_rate=0.0),
    )
    add(
        "BeitForImageClassification (abs. pos.)",
        "BeitForImageClassification",
        lambda: T.BeitConfig(**V, **LABELLED, use_absolute_position_embeddings=True, drop_path_rate=0.0),
    )
    add(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionForImageClassification",
        lambda: T.Data2VecVisionConfig(**V, **LABELLED, use_relative_position_bias=True, drop_path_rate=0.0),
    )
    add("ViTMSNForImageClassification", "ViTMSNForImageClassification", lambda: T.ViTMSNConfig(**V, **LABELLED))
    add("IJepaForImageClassification", "IJepaForImageClassification", lambda: T.IJepaConfig(**V, **LABELLED))
    add("CLIPForImageClassification", "CLIPForImageClassification", lambda: clipcfg(T.CLIPConfig, CLIPTOK, **LABELLED))
    add(
        "MetaClip2ForImageClassification",
        "MetaClip2ForImageClassification",
        lambda: clipcfg(T.MetaClip2Config, CLIPTOK, **LABELLED),
    )
    add("SiglipForImageClassification", "SiglipForImageClassification", lambda: clipcfg(T.SiglipConfig, **LABELLED))
    add(
        "Siglip2ForImageClassification",
        "Siglip2ForImageClassification",
        lambda: T.Siglip2Config(
            text_config=TX,
            vision_config={**{k: v for k, v in V.items() if k != "image_size"}, "num_patches": 16},
            **LABELLED,
        ),
    )
    add(
        "SwinForImageClassification",
        "SwinForImageClassification",
        lambda: T.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.0,
            **LABELLED,
        ),
    )
    add(
        "Swinv2ForImageClassification",
        "Swinv2ForImageClassification",
        lambda: T.Swinv2Config(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.0,
            **LABELLED,
        ),
    )
    add(
        "HieraForImageClassification",
        "HieraForImageClassification",
        lambda: T.HieraConfig(
            embed_dim=8,
            image_size=[64, 64],
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            masked_unit_size=[8, 8],
            **LABELLED,
        ),
        size=64,
    )
    add(
        "ConvNextForImageClassification",
        "ConvNextForImageClassification",
        lambda: T.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32, **LABELLED),
    )
    add(
        "ConvNextV2ForImageClassification",
        "ConvNextV2ForImageClassification",
        lambda: T.ConvNextV2Config(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32, **LABELLED),
    )
    add(
        "ResNetForImageClassification",
        "ResNetForImageClassification",
        lambda: T.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic", **LABELLED
        ),
    )
    add(
        "RegNetForImageClassification",
        "RegNetForImageClassification",
        lambda: T.RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], groups_width=8, **LABELLED
        ),
    )
    add(
        "BitForImageClassification",
        "BitForImageClassification",
        lambda: T.BitConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_groups=4, **LABELLED
        ),
    )
    add(
        "EfficientNetForImageClassification",
        "EfficientNetForImageClassification",
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
            **LABELLED,
        ),
    )
    add(
        "MobileNetV1ForImageClassification",
        "MobileNetV1ForImageClassification",
        lambda: T.MobileNetV1Config(depth_multiplier=0.25, image_size=32, **LABELLED),
    )
    add(
        "MobileNetV2ForImageClassification",
        "MobileNetV2ForImageClassification",
        lambda: T.MobileNetV2Config(depth_multiplier=0.25, image_size=32, **LABELLED),
    )
    add(
        "MobileViTForImageClassification",
        "MobileViTForImageClassification",
        lambda: T.MobileViTConfig(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
            num_attention_heads=2,
            **LABELLED,
        ),
        size=64,
    )
    add(
        "MobileViTV2ForImageClassification",
        "MobileViTV2ForImageClassification",
        lambda: T.MobileViTV2Config(
            image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[32, 32, 32], **LABELLED
        ),
        size=64,
    )
    add(
        "LevitForImageClassification",
        "LevitForImageClassification",
        lambda: T.LevitConfig(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            **LABELLED,
        ),
        size=64,
    )
    add(
        "LevitForImageClassificationWithTeacher",
        "LevitForImageClassificationWithTeacher",
        lambda: T.LevitConfig(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            **LABELLED,
        ),
        size=64,
    )
    add(
        "PvtForImageClassification",
        "PvtForImageClassification",
        lambda: T.PvtConfig(
            image_size=32,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            **LABELLED,
        ),
    )
    add(
        "PvtV2ForImageClassification",
        "PvtV2ForImageClassification",
        lambda: T.PvtV2Config(
            image_size=32,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            **LABELLED,
        ),
    )
    add(
        "SegformerForImageClassification",
        "SegformerForImageClassification",
        lambda: T.SegformerConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], **LABELLED
        ),
    )
    add(
        "CvtForImageClassification",
        "CvtForImageClassification",
        lambda: T.CvtConfig(
            embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0], **LABELLED
        ),
        size=64,
    )
    add(
        "PoolFormerForImageClassification",
        "PoolFormerForImageClassification",
        lambda: T.PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], **LABELLED),
    )
    add(
        "SwiftFormerForImageClassification",
        "SwiftFormerForImageClassification",
        lambda: T.SwiftFormerConfig(image_size=64, embed_dims=[8, 8, 16, 16], depths=[1, 1, 1, 1], **LABELLED),
        size=64,
    )
    add(
        "HGNetV2ForImageClassification",
        "HGNetV2ForImageClassification",
        lambda: T.HGNetV2Config(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 32],
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8, 16, 16],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[8, 16, 16, 32],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            depths=[1, 1, 1, 1],
            **LABELLED,
        ),
    )
    add(
        "PPLCNetForImageClassification",
        "PPLCNetForImageClassification",
        lambda: T.PPLCNetConfig(scale=0.25, class_expand=32, **LABELLED),
    )
    add(
        "PerceiverForImageClassificationLearned",
        "PerceiverForImageClassificationLearned",
        lambda: T.PerceiverConfig(
            num_latents=4,
            d_latents=32,
            num_self_attends_per_block=1,
            num_blocks=1,
            num_self_attention_heads=2,
            num_cross_attention_heads=1,
            image_size=32,
            train_size=[32, 32],
            **LABELLED,
        ),
    )
    add(
        "ImageGPTForImageClassification",
        "ImageGPTForImageClassification",
        lambda: T.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2, **LABELLED),
    )
    add(
        "VideoMAEForVideoClassification",
        "VideoMAEForVideoClassification",
        lambda: T.VideoMAEConfig(**V, num_frames=2, tubelet_size=2, **LABELLED),
        video=2,
    )
    add(
        "TimesformerForVideoClassification",
        "TimesformerForVideoClassification",
        lambda: T.TimesformerConfig(**V, num_frames=2, **LABELLED),
        video=2,
    )
    add(
        "VivitForVideoClassification",
        "VivitForVideoClassification",
        lambda: T.VivitConfig(
            **{k: v for k, v in V.items() if k != "patch_size"}, num_frames=2, tubelet_size=[2, 8, 8], **LABELLED
        ),
        video=2,
    )
    return found
