"""A space-time patch codec with the interface WanPipeline expects from its VAE.

Each 4 x 8 x 8 block of RGB pixels is one vector of 768 numbers; PCA keeps `z_dim` of them. The first latent frame
codes frame 0 alone (repeated four times), so n frames give (n - 1) / 4 + 1 latent frames, as in Wan. Encoding is
linear; decoding adds what a small convolution over neighbouring latents has learnt about the rest, above all the
edges that PCA alone leaves blocky.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

TEMPORAL, SPATIAL = 4, 8
PATCH_VALUES = TEMPORAL * SPATIAL * SPATIAL * 3


def to_patches(video: Tensor) -> Tensor:
    """`[B, 3, F, H, W]` -> `[B, f, h, w, 768]`; F = 4n + 1, H and W multiples of 8 (ValueError otherwise)."""
    batch, channels, frames, height, width = video.shape
    if channels != 3 or (frames - 1) % TEMPORAL or height % SPATIAL or width % SPATIAL:
        raise ValueError(
            f"the patch codec needs [B, 3, 4n + 1, 8a, 8b]; got {tuple(video.shape)}. Crop or pad the clip first"
        )
    video = torch.cat([video[:, :, :1].expand(-1, -1, TEMPORAL - 1, -1, -1), video], dim=2)
    video = video.reshape(batch, 3, -1, TEMPORAL, height // SPATIAL, SPATIAL, width // SPATIAL, SPATIAL)
    return video.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)


def chosen_patches(frames: Tensor, positions: Tensor) -> Tensor:
    """What `to_patches` makes of one clip, at chosen places only: `[F, H, W, 3]` and `[n, 3]` -> `[n, 768]`.

    A place is a latent frame, row and column. Nothing is copied of the clip besides: it may be seen in small part.
    """
    count, height, width = (len(frames) - 1) // TEMPORAL, frames.shape[1] // SPATIAL, frames.shape[2] // SPATIAL
    blocks = frames[1:].view(count, TEMPORAL, height, SPATIAL, width, SPATIAL, 3)
    out = frames.new_empty(len(positions), TEMPORAL, SPATIAL, SPATIAL, 3)
    start = positions[:, 0] == 0
    _, y, x = positions[start].unbind(1)
    out[start] = frames[0].view(height, SPATIAL, width, SPATIAL, 3)[y, :, x][:, None]
    f, y, x = positions[~start].unbind(1)
    out[~start] = blocks[f - 1, :, y, :, x]
    return out.flatten(1)


def from_patches(patches: Tensor) -> Tensor:
    """Inverse of `to_patches`; frame 0 is the mean of the four frames of the first patch row."""
    batch, frames, height, width, _ = patches.shape
    video = patches.reshape(batch, frames, height, width, TEMPORAL, SPATIAL, SPATIAL, 3)
    video = video.permute(0, 7, 1, 4, 2, 5, 3, 6)
    video = video.reshape(batch, 3, frames * TEMPORAL, height * SPATIAL, width * SPATIAL)
    first = video[:, :, :TEMPORAL].mean(dim=2, keepdim=True)
    return torch.cat([first, video[:, :, TEMPORAL:]], dim=2)


def build_refiner(z_dim: int, width: int) -> nn.Sequential:
    """From the latents of 3 x 3 x 3 neighbours to a correction of the middle patch; it starts as none at all."""
    last = nn.Conv3d(width, PATCH_VALUES, 1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    neighbours = nn.Conv3d(z_dim, width, 3, padding=1, padding_mode="replicate")
    return nn.Sequential(neighbours, nn.GELU(), nn.Conv3d(width, width, 1), nn.GELU(), last)


class PatchCodec(ModelMixin, ConfigMixin):
    """PCA patch codec. `decode` takes un-normalised latents `[B, z, f, h, w]`, as AutoencoderKLWan does.

    The pipeline maps model latents z to codec latents by z * latents_std + latents_mean. `latents_std` is the square
    root of each component's standard deviation (times a constant), which whitens half-way: strong components stay
    stronger, so that noise hides layout last and detail first. `refine_width` is the width of the learnt part of the
    decoder; 0 leaves it out.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 32,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_temporal: int = TEMPORAL,
        scale_factor_spatial: int = SPATIAL,
        refine_width: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(PATCH_VALUES))
        self.register_buffer("components", torch.zeros(z_dim, PATCH_VALUES))
        self.refine = build_refiner(z_dim, refine_width) if refine_width else None

    @property
    def device(self) -> torch.device:
        """Where the components live."""
        device: torch.device = self.components.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the components; `encode` and `decode` compute in it."""
        dtype: torch.dtype = self.components.dtype
        return dtype

    def encode(self, video: Tensor) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] -> codec latents `[B, z, f, h, w]` (not normalised)."""
        return self.encode_patches(to_patches(video.to(self.dtype))).movedim(-1, 1)

    def encode_patches(self, patches: Tensor) -> Tensor:
        """Patches `[..., 768]` of values in [-1, 1] -> codec latents `[..., z]` (not normalised)."""
        latents: Tensor = (patches - self.mean) @ self.components.T
        return latents

    def normalise(self, latents: Tensor) -> Tensor:
        """Codec latents `[B, z, ...]` -> the space the transformer works in."""
        shape = (1, -1, *(1 for _ in latents.shape[2:]))
        mean, std = (latents.new_tensor(v).view(shape) for v in (self.config.latents_mean, self.config.latents_std))
        return (latents - mean) / std

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Codec latents `[B, z, f, h, w]` -> video `[B, 3, 4f - 3, 8h, 8w]` clamped to [-1, 1]."""
        video = from_patches(self.decode_patches(latents.to(self.dtype))).clamp(-1.0, 1.0)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def decode_patches(self, latents: Tensor) -> Tensor:
        """Codec latents `[B, z, f, h, w]` -> patches `[B, f, h, w, 768]`."""
        patches: Tensor = latents.movedim(1, -1) @ self.components + self.mean
        if self.refine is not None:
            patches = patches + self.refine(self.normalise(latents)).movedim(1, -1)
        return patches

    def forward(self, video: Tensor) -> Any:
        """Encode and decode."""
        return self.decode(self.encode(video))


def fit(patches: Tensor, z_dim: int, seed: int = 0) -> PatchCodec:
    """Fit a codec to `patches` [N, 768] (values in [-1, 1]) with scikit-learn's PCA."""
    from sklearn.decomposition import PCA

    pca = PCA(n_components=z_dim, svd_solver="covariance_eigh", random_state=seed).fit(patches.double().numpy())
    deviation = torch.from_numpy(pca.explained_variance_).sqrt()
    std = deviation.sqrt()
    # One constant makes the mean variance of the normalised latents 1, the scale the noise has.
    std = std * ((deviation / std) ** 2).mean().sqrt()
    codec = PatchCodec(z_dim=z_dim, latents_mean=[0.0] * z_dim, latents_std=[float(v) for v in std])
    codec.mean.copy_(torch.from_numpy(pca.mean_))
    codec.components.copy_(torch.from_numpy(pca.components_))
    codec.eval()
    return codec
