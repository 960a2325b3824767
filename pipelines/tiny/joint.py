"""The second small model, of the joint kind: text tokens stand in the video's own self-attention, as in HunyuanVideo.

It has the width of the first one and, layer for layer, a place for its weights (`warm_start.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.pipelines.hunyuan_video.pipeline_output import HunyuanVideoPipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dsattn.pipelines.tiny.codec import PatchCodec
from dsattn.pipelines.tiny.model import DEFAULTS, MAX_TEXT, TEXT_DIM
from dsattn.presets import SHIPPED

HEADS, HEAD_DIM = 3, 64
DUAL, SINGLE = 3, 3
"""Blocks with weights of their own for text, then blocks that share theirs; together as many as the first model has."""
ROPE_AXES, ROPE_THETA = (24, 20, 20), 10000.0
"""WanRotaryPosEmbed at head_dim 64: 2 * (64 // 6) channels for height and for width, the rest for time."""


def build_joint_transformer(
    z_dim: int, dual: int = DUAL, single: int = SINGLE, heads: int = HEADS
) -> HunyuanVideoTransformer3DModel:
    """The HunyuanVideo architecture, one token per latent position, real guidance instead of a guidance embedding."""
    return HunyuanVideoTransformer3DModel(
        in_channels=z_dim,
        out_channels=z_dim,
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        num_layers=dual,
        num_single_layers=single,
        num_refiner_layers=1,
        mlp_ratio=4.0,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_theta=ROPE_THETA,
        rope_axes_dim=ROPE_AXES,
    ).eval()


def encode_text(text_encoder: UMT5EncoderModel, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text for the joint model.

    Args:
        text_encoder: of `build_text_encoder`.
        tokens, mask: `[B, T]`; every row has at least one valid token.

    Returns:
        Embeddings `[B, T, 128]`, zero where padded, and their mean over the valid tokens `[B, 128]`.

    """
    text = text_encoder(tokens, mask).last_hidden_state * mask[..., None]
    return text, (text.sum(1) / mask.sum(1, keepdim=True)).to(text.dtype)


class JointCodec(PatchCodec):
    """The codec as HunyuanVideoPipeline uses one: latents are divided by `scaling_factor` (1) and decoded.

    So `decode` takes the transformer's own, normalised latents; `encode` and `normalise` are the base class's.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(scaling_factor=1.0)

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Normalised latents `[B, z, f, h, w]` -> video `[B, 3, 4f - 3, 8h, 8w]` in [-1, 1]."""
        mean, std = (
            latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (self.config.latents_mean, self.config.latents_std)
        )
        return super().decode(latents * std + mean, return_dict)

    def forward(self, video: Tensor) -> Any:
        """Encode and decode."""
        return self.decode(self.normalise(self.encode(video)))


class TinyJointPipeline(HunyuanVideoPipeline):
    """HunyuanVideoPipeline with one small text encoder and the defaults of the small model.

    256 x 256, 33 frames, 20 steps; `guidance_scale` is the scale of real classifier-free guidance.
    """

    # Same data, size and steps as the first shipped model, on which the presets' schedule was measured.
    dsattn_family = SHIPPED
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        transformer: HunyuanVideoTransformer3DModel,
        vae: JointCodec,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        DiffusionPipeline.__init__(self)  # the parent's own asks for a second text encoder
        self.register_modules(
            text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_template: dict[str, Any] | None = None,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_sequence_length: int = MAX_TEXT,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings `[B, T, 128]`, pooled `[B, 128]` and the mask of valid tokens `[B, T]`; T is the padded length.

        Embeddings that are given are passed on as they are. There is no template and no second prompt.
        """
        if prompt_embeds is not None:
            if pooled_prompt_embeds is None or prompt_attention_mask is None:
                raise ValueError(
                    "prompt_embeds alone does not say which tokens are valid: give pooled_prompt_embeds and "
                    "prompt_attention_mask with it, all three from encode_prompt()"
                )
            return prompt_embeds, pooled_prompt_embeds, prompt_attention_mask
        inputs = self.tokenizer(
            [prompt] if isinstance(prompt, str) else prompt,
            padding="max_length",
            max_length=max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        tokens, mask = (x.to(device or self._execution_device) for x in (inputs.input_ids, inputs.attention_mask))
        text, pooled = (x.to(dtype or self.text_encoder.dtype) for x in encode_text(self.text_encoder, tokens, mask))
        text, pooled, mask = (x.repeat_interleave(num_videos_per_prompt, dim=0) for x in (text, pooled, mask))
        return text, pooled, mask

    def check_inputs(self, prompt: Any, prompt_2: Any, height: int, width: int, *args: Any, **kwargs: Any) -> None:
        """As the parent's, but sizes are multiples of 8: this model has patches of one latent position, not of two."""
        factor = self.vae_scale_factor_spatial
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {height} and {width}")
        super().check_inputs(prompt, prompt_2, 0, 0, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, negative_prompt: str | list[str] | None = None, **options: Any
    ) -> HunyuanVideoPipelineOutput | tuple[Any]:
        """Generate; every option of `HunyuanVideoPipeline.__call__` but `true_cfg_scale` can be given.

        Args:
            prompt: one or several.
            negative_prompt: what guidance leads away from; empty if left out.
            **options: `guidance_scale` (1 for none), sizes, steps and so on.

        """
        if "true_cfg_scale" in options:
            raise TypeError(f"{type(self).__name__} takes guidance_scale, which is real guidance here")
        defaults = DEFAULTS | {"max_sequence_length": self.tokenizer.model_max_length}
        options = defaults | options
        negative = "" if negative_prompt is None else negative_prompt
        given = options.get("negative_prompt_embeds") is not None
        if isinstance(negative, str) and not given:
            embeds = options.get("prompt_embeds")
            count = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, list) else 1
            negative = [negative] * count
        return super().__call__(
            prompt,
            negative_prompt=None if given else negative,
            true_cfg_scale=options["guidance_scale"],
            **options,
        )
