"""Metrics against their formulas and against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dsattn.errors import UsageError
from dsattn.metrics import (
    Fidelity,
    Interval,
    find_lpips,
    mean_interval,
    motion,
    ms_ssim,
    paired_interval,
    psnr,
    relative_l2,
    ssim,
    temporal_flickering,
)


def video(seed: int, frames: int = 3, height: int = 19, width: int = 23) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shift", [1, 5, 40])
def test_psnr_of_a_constant_error(shift):
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    result = psnr(a, a + np.uint8(shift))
    assert result.per_frame == pytest.approx([20 * math.log10(255 / shift)] * 2, abs=1e-9)
    assert not result.identical


def test_psnr_mean_and_worst_leave_equal_frames_out():
    a = video(0)
    b = a.copy()
    b[1] = np.where(b[1] < 128, b[1] + 2, b[1] - 2)
    b[2] = np.where(b[2] < 128, b[2] + 10, b[2] - 10)
    result = psnr(a, b)
    want = [20 * math.log10(255 / 2), 20 * math.log10(255 / 10)]
    assert result.per_frame[0] is None
    assert result.mean == pytest.approx(sum(want) / 2, abs=1e-9)
    assert (result.worst, result.worst_frame) == (pytest.approx(want[1], abs=1e-9), 2)
    assert not result.identical


def test_identical_videos():
    a = video(1)
    both = psnr(a, a.copy())
    assert both.identical and both.mean is None and both.worst is None and both.worst_frame is None
    assert ssim(a, a.copy()).per_frame == pytest.approx([1.0] * 3, abs=1e-12)


def test_ssim_against_the_definition():
    """The centre of an 11 x 11 grey image sees exactly one full window: compare the formula there."""
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 256, (1, 11, 11, 3), dtype=np.uint8) for _ in range(2))
    weight = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / np.outer(weight, weight).sum()
    values = []
    for channel in range(3):
        x, y = (frames[0, ..., channel].astype(float) for frames in (a, b))
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * x * x).sum() - mx**2, (weight * y * y).sum() - my**2
        cov = (weight * x * y).sum() - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    # skimage averages over the pixels whose window lies inside: here the centre alone.
    assert ssim(a, b).per_frame[0] == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_falls_with_noise():
    a = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[None, None, :, None], (1, 32, 1, 3))
    noise = np.random.default_rng(3).normal(size=a.shape)
    noisy = [np.clip(a + noise * level, 0, 255).astype(np.uint8) for level in (2, 10, 40)]
    means = [ssim(a, n).mean for n in noisy]
    assert 1 > means[0] > means[1] > means[2]


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        (video(0), video(0, frames=4), "one shape"),
        (video(0)[0], video(0)[0], "frames, height, width, 3"),
        (video(0).astype(float), video(0).astype(float), "uint8"),
        (video(0)[:0], video(0)[:0], "not empty"),
    ],
)
def test_wrong_frames(a, b, word):
    with pytest.raises(UsageError, match=word):
        psnr(a, b)


def test_frames_too_small_for_ssim():
    small = video(0, height=10)
    with pytest.raises(UsageError, match="at least 11x11"):
        ssim(small, small)


def test_relative_l2():
    a = torch.tensor([3.0, 4.0])
    assert relative_l2(a, torch.tensor([3.0, 4.5])) == pytest.approx(0.1, abs=1e-12)
    assert relative_l2(a, a) == 0
    assert relative_l2(torch.zeros(2), a) == math.inf
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_l2(a.bfloat16(), a) == 0
    with pytest.raises(UsageError, match="one shape"):
        relative_l2(a, a[:1])


def test_to_dict_is_plain():
    assert Fidelity((None, 2.0)).to_dict() == {
        "mean": 2.0,
        "worst": 2.0,
        "worst_frame": 1,
        "identical": False,
        "per_frame": [None, 2.0],
    }


@pytest.mark.parametrize("size", [(11, 11), (19, 23), (40, 37)])
def test_psnr_and_ssim_against_skimage(size):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = video(4, 2, *size), smooth(video(5, 2, *size))
    b[0] = a[0] // 2 + 60
    want_psnr = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    options = {"data_range": 255, "channel_axis": -1, "gaussian_weights": True, "sigma": 1.5}
    want_ssim = [structural_similarity(x, y, use_sample_covariance=False, **options) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b).per_frame == pytest.approx(want_psnr, abs=1e-12)
    assert ssim(a, b).per_frame == pytest.approx(want_ssim, abs=1e-12)
    backwards = a[..., ::-1]
    assert ssim(backwards, b[..., ::-1]).per_frame == pytest.approx(want_ssim, abs=1e-12)


def smooth(frames):
    return ((frames.astype(int) + np.roll(frames, 1, axis=2) + np.roll(frames, 1, axis=1)) // 3).astype(np.uint8)


def ms_ssim_oracle(a, b):
    """Scale by scale from skimage: with a huge K1 its luminance term is 1, and contrast-structure is left."""
    from skimage.metrics import structural_similarity

    def terms(x, y, k1):
        options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return structural_similarity(x, y, K1=k1, **options)

    values = []
    for channel in range(3):
        x, y = (frame[..., channel].astype(np.float64) for frame in (a, b))
        product = 1.0
        for weight in (0.0448, 0.2856, 0.3001, 0.2363):
            product *= max(terms(x, y, 1e5), 0) ** weight
            x, y = (
                sum(f[i : f.shape[0] // 2 * 2 : 2, j : f.shape[1] // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)) / 4
                for f in (x, y)
            )
        values.append(product * max(terms(x, y, 0.01), 0) ** 0.1333)
    return np.mean(values)


@pytest.mark.parametrize("size", [(176, 176), (181, 203)])
def test_ms_ssim_against_skimage(size):
    from scipy.ndimage import gaussian_filter

    base = gaussian_filter(video(6, 3, *size).astype(float), (0, 3, 3, 0))
    a = np.clip((base - 127) * 8 + 127, 0, 255).astype(np.uint8)
    noise = np.random.default_rng(7).normal(size=a.shape) * np.array([5, 30, 90])[:, None, None, None]
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    got = ms_ssim(a, b)
    assert got.per_frame == pytest.approx([ms_ssim_oracle(x, y) for x, y in zip(a, b, strict=True)], abs=1e-9)
    assert 1 > got.per_frame[0] > got.per_frame[1] > got.per_frame[2] > 0
    assert ms_ssim(a[:1], a[:1].copy()).per_frame == pytest.approx([1.0], abs=1e-12)
    # Inverted brightness has negative structure, which counts as 0.
    assert ms_ssim(a[:1], 255 - a[:1]).per_frame == (0.0,)


def test_ms_ssim_too_small():
    small = video(0, 1, 175, 200)
    with pytest.raises(UsageError, match="at least 176x176 pixels, got 175x200"):
        ms_ssim(small, small)


def vbench_flickering(frames):
    """As in vbench/temporal_flickering.py: absolute differences and their mean in float32, BGR."""
    import cv2

    frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    changes = [
        np.mean(cv2.absdiff(np.array(a, dtype=np.float32), np.array(b, dtype=np.float32)))
        for a, b in zip(frames[:-1], frames[1:], strict=True)
    ]
    return (255.0 - np.mean(np.array(changes)).item()) / 255.0


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 17, 31), (9, 64, 64), (5, 180, 320)])
def test_flickering_is_vbenchs(frames, height, width):
    clip = video(8, frames, height, width)
    # VBench averages in float32.
    assert temporal_flickering(clip) == pytest.approx(vbench_flickering(clip), abs=2e-7)
    assert temporal_flickering(smooth(clip)) == pytest.approx(vbench_flickering(smooth(clip)), abs=2e-7)


def test_flickering_by_hand():
    a = np.zeros((3, 16, 16, 3), np.uint8)
    a[1], a[2, :8] = 51, 51
    assert temporal_flickering(a) == pytest.approx(1 - (51 + 25.5) / 2 / 255, abs=1e-12)
    assert temporal_flickering(a[:1].repeat(4, axis=0)) == 1.0
    with pytest.raises(UsageError, match="at least 2 of them, got 1"):
        temporal_flickering(a[:1])


def moving(shift, frames=9, side=96):
    from scipy.ndimage import gaussian_filter

    texture = gaussian_filter(np.random.default_rng(9).normal(size=(side, side * 3)), 2)
    texture = np.clip(texture / texture.std() * 40 + 127, 0, 255).astype(np.uint8)
    clip = [texture[:, side + shift * t : 2 * side + shift * t] for t in range(frames)]
    return np.stack(clip)[..., None].repeat(3, axis=-1)


def test_motion_proxies():
    found = motion(moving(3), fps=8)
    # 3 pixels of 96 are 8 of 256: above 6, so the clip moves.
    assert found.proxy_flow == pytest.approx(8, rel=0.1) and found.proxy_dynamic == 1
    assert motion(moving(3), fps=8.0) == found, "deterministic"
    slow = motion(moving(1), fps=8)
    assert slow.proxy_flow == pytest.approx(8 / 3, rel=0.1) and slow.proxy_dynamic == 0
    # At 24 fps every third frame is looked at.
    assert motion(moving(1), fps=24).proxy_flow == pytest.approx(8, rel=0.1)
    still = motion(moving(0), fps=8)
    assert (still.proxy_flow, still.proxy_dynamic, still.proxy_warp_error) == (0, 0, 0)
    noise = np.random.default_rng(3).integers(-30, 31, moving(3).shape)
    noisy = np.clip(moving(3) + noise, 0, 255).astype(np.uint8)
    assert motion(noisy, fps=8).proxy_warp_error > 3 * found.proxy_warp_error
    with pytest.raises(UsageError, match="at least 16x16"):
        motion(video(0, height=15), fps=8)


def lpips_weights(folder, seed=0):
    """Random weights in the shapes of AlexNet and of the linear layers, under the names of their files."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0": (64, 3, 11, 11), "3": (192, 64, 5, 5), "6": (384, 192, 3, 3), "8": (256, 384, 3, 3)}
    body = {}
    for name, shape in {**shapes, "10": (256, 256, 3, 3)}.items():
        body[f"features.{name}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        body[f"features.{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    widths = (64, 192, 384, 256, 256)
    head = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator) for i, n in enumerate(widths)}
    folder.mkdir(exist_ok=True)
    torch.save(body, folder / "alexnet-owt-7be5be79.pth")
    torch.save(head, folder / "alex.pth")
    return body, head


def test_lpips_against_modules_in_float64(tmp_path):
    body, head = lpips_weights(tmp_path)
    nn = torch.nn
    layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1)]
    layers += [nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers).double()
    net.load_state_dict({name.removeprefix("features."): value for name, value in body.items()})
    a, b = video(10, 2, 63, 70), smooth(video(11, 2, 63, 70))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    want = []
    with torch.no_grad():
        for pair in zip(a, b, strict=True):
            x = torch.stack([(torch.from_numpy(f).permute(2, 0, 1) / 127.5 - 1 - shift) / scale for f in pair]).double()
            total, level = 0.0, 0
            for layer in net:
                x = layer(x)
                if isinstance(layer, nn.ReLU):
                    unit = x / x.norm(dim=1, keepdim=True)
                    weighted = (unit[0] - unit[1]).square() * head[f"lin{level}.model.1.weight"][0].double()
                    total, level = total + float(weighted.sum(dim=0).mean()), level + 1
            want.append(total)
    metric = find_lpips(tmp_path)
    assert metric(a, b).per_frame == pytest.approx(want, rel=1e-4)
    assert metric(a, a.copy()).per_frame == (0.0, 0.0)
    with pytest.raises(UsageError, match="at least 63x63"):
        metric(video(0), video(0))


def test_lpips_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    text = find_lpips()
    assert "weights not found: alexnet-owt-7be5be79.pth" in text and "--lpips-weights" in text
    with pytest.raises(UsageError, match="weights not found: alexnet-owt-7be5be79.pth and alex.pth"):
        find_lpips(tmp_path)
    lpips_weights(tmp_path)
    torch.save({"other": 1}, tmp_path / "alex.pth")
    with pytest.raises(UsageError, match="cannot be used"):
        find_lpips(tmp_path)
    (tmp_path / "alex.pth").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be used"):
        find_lpips(tmp_path)


def test_paired_interval():
    rng = np.random.default_rng(0)
    dense = {(f"p{i}", j): float(rng.normal()) for i in range(30) for j in range(2)}
    noise = {key: float(rng.normal(0.5, 0.1)) for key in dense}
    sparse = {key: value + noise[key] for key, value in dense.items()}
    found = paired_interval(dense, {**sparse, ("elsewhere", 0): 9.0})
    # Pairing takes the spread between prompts out: 0.1 per clip, two clips per prompt, 30 prompts.
    half = 1.96 * 0.1 / math.sqrt(2 * 30)
    assert found.prompts == 30 and found.mean == pytest.approx(np.mean(list(noise.values())))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.35)
    assert found.low < found.mean < found.high
    assert paired_interval(dense, sparse) == found, "the seed is fixed"
    assert paired_interval(dense, dense).low == paired_interval(dense, dense).high == 0


def test_prompts_weigh_the_same_whatever_their_clips():
    assert mean_interval({"a": [0.0] * 9, "b": [1.0]}).mean == 0.5
    assert mean_interval({"a": [2.0]}) == Interval(2.0, None, None, 1)
    assert mean_interval({}) is None and mean_interval({"a": []}) is None
