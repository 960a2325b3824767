"""Real diffusers pipelines with random weights, small enough to run in a blink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dsattn.engine import Engine
from dsattn.grid import Call

Pipe = tuple[Any, dict[str, Any]]

# Arguments for sequences of several 64-token blocks: 5 x 8 x 8 tokens for Wan.
LONGER = {"height": 128, "width": 128, "num_frames": 17}
# A sparse engine that needs no compilation.
SPARSE: dict[str, Any] = {"method": "topk", "density": 0.3, "impl": "torch"}


class Recorder(Engine):
    """An engine that also keeps the calls it was given and counts its resets."""

    def __init__(self, method: str = "topk", **options: Any) -> None:
        self.calls: list[Call] = []
        self.resets = 0
        super().__init__(method, **options)

    def __call__(self, q: Any, k: Any, v: Any, call: Call, **rest: Any) -> torch.Tensor:
        self.calls.append(call)
        return super().__call__(q, k, v, call, **rest)

    def reset(self) -> None:
        self.resets += 1
        super().reset()

    def steps(self) -> list[tuple[int, str, str]]:
        """Step, branch and model of the calls, repetitions over layers left out."""
        return list(dict.fromkeys((call.step, call.branch, call.model) for call in self.calls))


def recorder() -> Recorder:
    return Recorder(**SPARSE)


def seed(value: int = 0) -> None:
    torch.manual_seed(value)


def tokenizer(max_len: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with 259 tokens, made in memory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_len
    )


_T5 = {
    "vocab_size": 259,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_T5, feed_forward_proj="gated-gelu")).eval()


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_T5)).eval()


def image(size: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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


def flow(shift: float = 7.0) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def _wan_parts() -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": umt5(), "vae": wan_vae(), "scheduler": flow()}


def call_args(**more: Any) -> dict[str, Any]:
    return {
        "prompt": "a red fox",
        "negative_prompt": "bad",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "output_type": "latent",
        **more,
    }


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
    parts = {
        **_wan_parts(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
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
    parts = {
        **_wan_parts(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
    return SkyReelsV2Pipeline(transformer=transformer, **parts), call_args()


def skyreels_df() -> Pipe:
    seed()
    transformer = wan_transformer(SkyReelsV2Transformer3DModel)
    parts = {
        **_wan_parts(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
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


def run(pipe: Any, args: dict[str, Any], **more: Any) -> torch.Tensor:
    """Latents of one run with a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe(**{**args, **more}, generator=generator).frames
    return torch.as_tensor(out)


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
