"""The shipped small model: its data generator, codec, loader, pipeline, training script and evaluation."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.codec import PatchCodec, from_patches, to_patches
from dsattn.pipelines.tiny.loader import WEIGHTS, load_tiny, verify
from dsattn.pipelines.tiny.model import MAX_TEXT, build_tokenizer
from dsattn.pipelines.tiny.render import render

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return load_tiny().vae


def rendered(seed: int, count: int, frames: int, height: int, width: int, held_out: bool = True) -> torch.Tensor:
    stream = data.clips(seed, held_out=held_out)
    videos = [render(next(stream), frames, height, width) for _ in range(count)]
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) * 2 - 1


# ---- tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [data.DEFAULT_PROMPT, "", "Ein Füchschen, 3-mal!", "火", "a " * 200])
def test_any_prompt_encodes(prompt: str) -> None:
    tokenizer = build_tokenizer()
    out = tokenizer([prompt], padding="max_length", max_length=MAX_TEXT, truncation=True, return_tensors="pt")
    assert out.input_ids.shape == (1, MAX_TEXT)
    assert out.attention_mask.sum() >= 1
    assert out.input_ids[0, out.attention_mask[0].sum() - 1] == tokenizer.eos_token_id


def test_grammar_words_are_single_tokens() -> None:
    tokenizer = build_tokenizer()
    for word in data.vocabulary():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    stream = data.clips(1)
    lengths = [len(tokenizer(next(stream).caption).input_ids) for _ in range(500)]
    assert max(lengths) <= MAX_TEXT


# ---- codec ---------------------------------------------------------------------------------------------------------


def test_patches_are_a_bijection_after_the_first_frame() -> None:
    video = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0))
    patches = to_patches(video)
    assert patches.shape == (2, 3, 2, 3, 768)
    assert torch.allclose(from_patches(patches), video, atol=1e-6)


def test_patches_refuse_other_shapes() -> None:
    for shape in ((1, 3, 8, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16)):
        with pytest.raises(ValueError, match="needs"):
            to_patches(torch.zeros(shape))


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_codec_psnr_on_held_out_clips(codec: PatchCodec, frames: int) -> None:
    video = rendered(11, 4, 33, 256, 256)[:, :, :frames]
    latents = codec.encode(video)
    assert latents.shape == (4, codec.config.z_dim, (frames - 1) // 4 + 1, 32, 32)
    back = codec.decode(latents, return_dict=False)[0]
    assert back.shape == video.shape and back.abs().max() <= 1
    psnr = 10 * torch.log10(4 / (back - video).square().mean())
    assert psnr >= 32.0


@pytest.mark.parametrize(("size", "count", "seeds"), [((17, 128, 128), 24, 8), ((33, 256, 256), 16, 1)])
def test_latents_have_the_scale_of_the_noise(
    codec: PatchCodec, size: tuple[int, int, int], count: int, seeds: int
) -> None:
    # Clips differ much in this: 24 small ones of one seed say little.
    drawn = (rendered(12 + seed, count, *size, held_out=False) for seed in range(seeds))
    latents = torch.cat([codec.normalise(codec.encode(clips)) for clips in drawn])
    assert 0.6 < latents.square().mean() < 1.6
    spread = latents.std(dim=(0, 2, 3, 4))
    assert spread[0] > 2 * spread[-1]  # half-whitened: the order of the components survives


# ---- loader --------------------------------------------------------------------------------------------------------


def test_weights_are_small_and_load_in_bfloat16() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) <= 16 * 2**20 * 1.2
    pipe = load_tiny(torch.bfloat16)
    for module in (pipe.transformer, pipe.text_encoder, pipe.vae):
        assert module.dtype == torch.bfloat16


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS, folder)
    verify(folder)
    target = folder / "transformer.safetensors"
    content = bytearray(target.read_bytes())
    content[-100] ^= 1
    target.write_bytes(content)
    with pytest.raises(ValueError, match=r"transformer\.safetensors.*expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"):
        load_tiny(weights_dir=folder)
    target.unlink()
    with pytest.raises(FileNotFoundError, match=r"transformer\.safetensors is missing"):
        load_tiny(weights_dir=folder)


def test_checksums_name_every_file() -> None:
    listed = json.loads((WEIGHTS / "checksums.json").read_text())
    assert set(listed) == {f.name for f in WEIGHTS.iterdir()} - {"checksums.json"}


# ---- pipeline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5])
def test_pipeline_generates(frames: int) -> None:
    pipe = load_tiny()
    pipe.set_progress_bar_config(disable=True)

    def run() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        prompts = [data.DEFAULT_PROMPT, "an unheard-of thing"]
        options = {"num_inference_steps": 2, "height": 64, "width": 48, "num_frames": frames}
        return pipe(prompts, generator=generator, **options).frames

    video = run()
    assert video.shape == (2, frames, 64, 48, 3)
    assert np.isfinite(video).all() and video.min() >= 0 and video.max() <= 1
    assert video.std() > 0.01
    assert np.array_equal(video, run())


def test_defaults_are_the_small_models() -> None:
    pipe = load_tiny()
    pipe.set_progress_bar_config(disable=True)
    shapes = []

    def record(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        shapes.append((kwargs["hidden_states"].shape, kwargs["encoder_hidden_states"].shape))
        raise InterruptedError

    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    with pytest.raises(InterruptedError):  # the shapes are all this test needs: the full size takes seconds
        pipe("a red circle", output_type="latent")
    assert shapes == [((1, pipe.vae.config.z_dim, 9, 32, 32), (1, pipe.tokenizer.model_max_length, 128))]
