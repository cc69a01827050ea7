"""Dual encoders."""

from __future__ import annotations

import transformers as T

from .specs import BERT, CLIPTOK, TX, Spec, V, clipcfg


def vtde(text):
    vision = T.ViTConfig(**V)
    t = T.BertConfig(**BERT) if text == "bert" else T.CLIPTextConfig(**{**TX, **CLIPTOK})
    return T.VisionTextDualEncoderConfig.from_vision_text_configs(vision, t, projection_dim=24)


def dual_encoders() -> list[Spec]:
    found: list[Spec] = []

    def add(name, cls, config, **others):
        found.append(Spec(name, cls, "dual", config, **others))

    add(
        "CLIPModel (eos in config)",
        "CLIPModel",
        lambda: clipcfg(T.CLIPConfig, {**CLIPTOK, "projection_dim": 24}, {"projection_dim": 24}, projection_dim=24),
    )
    add(
        "CLIPModel (legacy eos=2)",
        "CLIPModel",
        lambda: clipcfg(
            T.CLIPConfig,
            {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 24},
            {"projection_dim": 24},
            projection_dim=24,
        ),
    )
    add(
        "MetaClip2Model (eos=2, as released)",
        "MetaClip2Model",
        lambda: clipcfg(
            T.MetaClip2Config,
            {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 24},
            {"projection_dim": 24},
            projection_dim=24,
        ),
        tok="xlmr",
    )
    add(
        "SiglipModel",
        "SiglipModel",
        lambda: clipcfg(
            T.SiglipConfig,
            {
                "bos_token_id": None,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "projection_size": 32,
                "max_position_embeddings": 64,
            },
        ),
        tok="siglip",
        max_length=64,
    )
    add(
        "Siglip2Model (naflex)",
        "Siglip2Model",
        lambda: T.Siglip2Config(
            text_config={
                **TX,
                "projection_size": 32,
                "bos_token_id": None,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "max_position_embeddings": 64,
            },
            vision_config={**{k: v for k, v in V.items() if k != "image_size"}, "num_patches": 16},
        ),
        tok="siglip",
        max_length=64,
    )
    add(
        "AltCLIPModel",
        "AltCLIPModel",
        lambda: T.AltCLIPConfig(
            text_config={
                **BERT,
                "max_position_embeddings": 32,
                "pad_token_id": 1,
                "project_dim": 32,
                "type_vocab_size": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
            },
            vision_config={**V, "projection_dim": 24},
            projection_dim=24,
        ),
        tok="xlmr",
    )
    add(
        "ChineseCLIPModel",
        "ChineseCLIPModel",
        lambda: T.ChineseCLIPConfig(text_config=BERT, vision_config={**V, "projection_dim": 24}, projection_dim=24),
        tok="bert",
    )
    add(
        "GroupViTModel",
        "GroupViTModel",
        lambda: T.GroupViTConfig(
            text_config={**TX, **CLIPTOK},
            vision_config={
                **{k: v for k, v in V.items() if k not in ("num_hidden_layers",)},
                "depths": [2, 2, 1],
                "num_group_tokens": [4, 4, 0],
                "num_output_groups": [4, 2, 2],
                "num_hidden_layers": 5,
            },
            projection_dim=24,
            projection_intermediate_dim=48,
        ),
    )
    add(
        "AlignModel",
        "AlignModel",
        lambda: T.AlignConfig(
            text_config=BERT,
            vision_config={
                "image_size": 32,
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "depth_divisor": 8,
                "kernel_sizes": [3, 3],
                "in_channels": [32, 16],
                "out_channels": [16, 24],
                "strides": [1, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 6],
                "hidden_dim": 1280,
            },
            projection_dim=24,
        ),
        tok="bert",
    )
    add(
        "BlipModel",
        "BlipModel",
        lambda: T.BlipConfig(
            text_config={
                **BERT,
                "encoder_hidden_size": 32,
                "bos_token_id": 60,
                "eos_token_id": 61,
                "sep_token_id": 61,
                "is_decoder": False,
            },
            vision_config=V,
            projection_dim=24,
        ),
        tok="bert",
    )
    add(
        "BlipForImageTextRetrieval",
        "BlipForImageTextRetrieval",
        lambda: T.BlipConfig(
            text_config={
                **BERT,
                "encoder_hidden_size": 32,
                "bos_token_id": 60,
                "eos_token_id": 61,
                "sep_token_id": 61,
            },
            vision_config=V,
            projection_dim=24,
            image_text_hidden_size=16,
        ),
        tok="bert",
    )
    add(
        "Blip2ForImageTextRetrieval",
        "Blip2ForImageTextRetrieval",
        lambda: T.Blip2Config(
            vision_config=V,
            qformer_config={
                "vocab_size": 64,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "encoder_hidden_size": 32,
                "max_position_embeddings": 24,
                "use_qformer_text_input": True,
            },
            text_config={
                "model_type": "opt",
                "vocab_size": 64,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "ffn_dim": 32,
                "num_attention_heads": 2,
                "word_embed_proj_dim": 32,
            },
            num_query_tokens=4,
            image_text_hidden_size=16,
        ),
        tok="bert",
    )
    add(
        "CLIPSegModel",
        "CLIPSegModel",
        lambda: clipcfg(T.CLIPSegConfig, {**CLIPTOK}, projection_dim=24, extract_layers=[0, 1, 2], reduce_dim=16),
    )
    add(
        "CLIPSegForImageSegmentation",
        "CLIPSegForImageSegmentation",
        lambda: clipcfg(
            T.CLIPSegConfig,
            {**CLIPTOK},
            projection_dim=32,
            extract_layers=[0, 1, 2],
            reduce_dim=32,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        ),
    )
    add(
        "OwlViTModel",
        "OwlViTModel",
        lambda: clipcfg(
            T.OwlViTConfig, {"bos_token_id": 61, "eos_token_id": 62, "pad_token_id": 0}, projection_dim=24
        ),
    )
    add(
        "XCLIPModel",
        "XCLIPModel",
        lambda: clipcfg(
            T.XCLIPConfig,
            {**CLIPTOK},
            {
                "num_frames": 2,
                "mit_hidden_size": 24,
                "mit_intermediate_size": 32,
                "mit_num_hidden_layers": 1,
                "mit_num_attention_heads": 2,
            },
            projection_dim=24,
            prompt_layers=1,
            prompt_num_attention_heads=2,
        ),
        video=2,
    )
    add(
        "FlavaModel",
        "FlavaModel",
        lambda: T.FlavaConfig(
            image_config=V,
            text_config=BERT,
            multimodal_config={
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
            hidden_size=32,
            projection_dim=24,
        ),
        tok="bert",
    )
    add(
        "Aimv2Model",
        "Aimv2Model",
        lambda: T.Aimv2Config(text_config={**TX, "eos_token_id": 62}, vision_config=V, projection_dim=24),
    )
    add(
        "Tipsv2Model",
        "Tipsv2Model",
        lambda: T.Tipsv2Config(
            text_config={**TX},
            vision_config={**{k: v for k, v in V.items() if k != "intermediate_size"}, "mlp_ratio": 2},
        ),
        tok="plain",
    )

    add("VisionTextDualEncoder (ViT+BERT)", "VisionTextDualEncoderModel", lambda: vtde("bert"), tok="bert")
    add("VisionTextDualEncoder (ViT+CLIP text)", "VisionTextDualEncoderModel", lambda: vtde("clip"))
    add(
        "VideoPrismClipModel",
        "VideoPrismClipModel",
        lambda: T.VideoPrismConfig(
            text_config={**TX},
            vision_config={
                "image_size": 32,
                "num_frames": 2,
                "tubelet_size": [1, 8, 8],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "num_spatial_layers": 2,
                "num_temporal_layers": 2,
                "num_auxiliary_layers": 1,
            },
        ),
        video=2,
        tok="plain",
    )
    return found
