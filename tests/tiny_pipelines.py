"""Real diffusers pipelines with random weights, small enough to run in a blink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
)

from .tiny_parts import (  # noqa: F401  tests take everything from here
    LONGER,
    SPARSE,
    Pipe,
    Recorder,
    call_args,
    flow,
    image,
    recorder,
    run,
    seed,
    t5,
    tokenizer,
    umt5,
    unipc,
)


def wan_transformer(cls: type = WanTransformer3DModel, **options: Any) -> Any:
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 64,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return cls(**{**config, **options}).eval()


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def _wan_parts() -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": umt5(), "vae": wan_vae(), "scheduler": flow()}


def wan(layers: int = 2, **options: Any) -> Pipe:
    seed()
    transformer = wan_transformer(num_layers=layers, **options)
    return WanPipeline(transformer=transformer, **_wan_parts()), call_args()


def wan_two() -> Pipe:
    seed()
    pipe = WanPipeline(
        transformer=wan_transformer(), transformer_2=wan_transformer(), boundary_ratio=0.875, **_wan_parts()
    )
    return pipe, call_args(num_inference_steps=6)


def wan_ti2v() -> Pipe:
    seed()
    return WanPipeline(transformer=wan_transformer(), expand_timesteps=True, **_wan_parts()), call_args()


def wan_i2v() -> Pipe:
    seed()
    pipe = WanImageToVideoPipeline(transformer=wan_transformer(in_channels=36), **_wan_parts())
    return pipe, call_args(image=image())


def wan_ti2v_i2v() -> Pipe:
    seed()
    pipe = WanImageToVideoPipeline(transformer=wan_transformer(), expand_timesteps=True, **_wan_parts())
    return pipe, call_args(image=image())


def wan_v2v() -> Pipe:
    seed()
    parts = {**_wan_parts(), "scheduler": unipc()}
    pipe = WanVideoToVideoPipeline(transformer=wan_transformer(), **parts)
    args = call_args(video=[image()] * 9, strength=0.75, num_inference_steps=4)
    del args["num_frames"]
    return pipe, args


def wan_vace() -> Pipe:
    seed()
    transformer = wan_transformer(WanVACETransformer3DModel, num_layers=3, vace_layers=[0, 2], vace_in_channels=96)
    pipe = WanVACEPipeline(transformer=transformer, **_wan_parts())
    return pipe, call_args(reference_images=[image()])


def skyreels() -> Pipe:
    seed()
    transformer = wan_transformer(SkyReelsV2Transformer3DModel)
    parts = {**_wan_parts(), "scheduler": unipc()}
    return SkyReelsV2Pipeline(transformer=transformer, **parts), call_args()


def skyreels_df() -> Pipe:
    seed()
    transformer = wan_transformer(SkyReelsV2Transformer3DModel)
    parts = {**_wan_parts(), "scheduler": unipc()}
    pipe = SkyReelsV2DiffusionForcingPipeline(transformer=transformer, **parts)
    return pipe, call_args(base_num_frames=9, overlap_history=None)


def hunyuan_transformer(layers: int = 1, **options: Any) -> HunyuanVideoTransformer3DModel:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": layers,
        "num_single_layers": layers,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    return HunyuanVideoTransformer3DModel(**{**config, **options}).eval()


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    ).eval()


def hunyuan(layers: int = 1) -> Pipe:
    seed()
    llama = LlamaConfig(
        hidden_size=16, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=259, pad_token_id=0
    )
    clip = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=259,
        eos_token_id=1,
        pad_token_id=0,
        projection_dim=8,
    )
    pipe = HunyuanVideoPipeline(
        transformer=hunyuan_transformer(layers),
        vae=hunyuan_vae(),
        scheduler=flow(),
        text_encoder=LlamaModel(llama).eval(),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(77),
    )
    args = call_args(prompt_template={"template": "{}", "crop_start": 0}, guidance_scale=4.5)
    del args["negative_prompt"]
    return pipe, args


def hunyuan15_transformer(layers: int = 2) -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=layers,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()


def hunyuan15(layers: int = 2) -> Pipe:
    """Prompt embeddings stand in for its two text encoders; both have padding at the end."""
    seed()
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    pipe = HunyuanVideo15Pipeline(
        transformer=hunyuan15_transformer(layers),
        vae=vae,
        scheduler=flow(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipe.vision_num_semantic_tokens = 5
    args: dict[str, Any] = {}
    for prefix, valid in (("", (9, 4)), ("negative_", (3, 0))):
        for suffix, length, width, count in (("", 12, 16, valid[0]), ("_2", 6, 12, valid[1])):
            args[f"{prefix}prompt_embeds{suffix}"] = torch.randn(1, length, width)
            args[f"{prefix}prompt_embeds_mask{suffix}"] = (torch.arange(length) < count).long()[None]
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}
    return pipe, {**args, **sizes}


def cogvideox_transformer(rotary: bool = False, **options: Any) -> CogVideoXTransformer3DModel:
    config: dict[str, Any] = {
        "num_attention_heads": 2 if rotary else 4,
        "attention_head_dim": 16 if rotary else 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": rotary,
    }
    return CogVideoXTransformer3DModel(**{**config, **options}).eval()


def cogvideox(rotary: bool = False, **options: Any) -> Pipe:
    seed()
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae,
        transformer=cogvideox_transformer(rotary, **options),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return pipe, call_args()


def cogvideox_rotary() -> Pipe:
    return cogvideox(rotary=True)


def cogvideox15() -> Pipe:
    pipe, args = cogvideox(rotary=True, patch_size_t=2, patch_bias=False)
    return pipe, {**args, "num_frames": 17}


def mochi() -> Pipe:
    seed()
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    pipe = MochiPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        force_zeros_for_empty_prompt=True,
    )
    return pipe, call_args(num_frames=7)


def _ltx(cls: type) -> Any:
    seed()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    return cls(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def ltx() -> Pipe:
    return _ltx(LTXPipeline), call_args()


def ltx_i2v() -> Pipe:
    return _ltx(LTXImageToVideoPipeline), call_args(image=image())


def ltx_condition(frame_index: int = 8) -> Pipe:
    """With ``frame_index`` other than 0 the tokens of the condition stand in front of the video."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    condition = LTXVideoCondition(image=image(), frame_index=frame_index)
    return _ltx(LTXConditionPipeline), call_args(conditions=[condition], num_frames=17)


BUILDERS: dict[str, Callable[[], Pipe]] = {
    "wan": wan,
    "wan_two": wan_two,
    "wan_ti2v": wan_ti2v,
    "wan_i2v": wan_i2v,
    "wan_ti2v_i2v": wan_ti2v_i2v,
    "wan_v2v": wan_v2v,
    "wan_vace": wan_vace,
    "skyreels": skyreels,
    "skyreels_df": skyreels_df,
    "hunyuan": hunyuan,
    "hunyuan15": hunyuan15,
    "cogvideox": cogvideox,
    "cogvideox_rotary": cogvideox_rotary,
    "cogvideox15": cogvideox15,
    "mochi": mochi,
    "ltx": ltx,
    "ltx_i2v": ltx_i2v,
    "ltx_condition": ltx_condition,
}
