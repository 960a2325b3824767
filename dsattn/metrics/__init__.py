"""What is measured: time and memory of a run, how far its video is from the dense one, and what it is like in itself.

``DEFINITIONS`` says once, in words for a report, what every figure is.
"""

from dsattn.metrics.bootstrap import Interval, mean_interval, paired_interval
from dsattn.metrics.clock import Clock, PeakMemory
from dsattn.metrics.fidelity import (
    MS_SSIM_SIDE,
    SSIM_WINDOW,
    Fidelity,
    ms_ssim,
    psnr,
    relative_l2,
    ssim,
)
from dsattn.metrics.frames import Frames, check_frames
from dsattn.metrics.lpips import LPIPS_SIDE, Lpips, find_lpips
from dsattn.metrics.temporal import Motion, motion, temporal_flickering

DEFINITIONS = {
    "psnr": "dB against the dense clip of the same seed: 10 log10(255² / MSE) of each uint8 frame over all pixels and "
    "channels, then the mean over frames; equal frames are left out",
    "ssim": "against the dense clip: per colour channel, Gaussian window 11 x 11 of sigma 1.5, population covariance, "
    "windows inside the frame only; mean over channels, then frames",
    "ms_ssim": "against the dense clip: five scales of SSIM's terms (Wang et al. 2003, 2 x 2 means between), "
    "per colour channel; mean over channels, then frames; needs 176 pixels a side",
    "lpips": "distance to the dense clip, 0 is equal: LPIPS 0.1 with AlexNet on frames in [-1, 1]; mean over frames",
    "temporal_flickering": "VBench's dimension: (255 - mean absolute change between neighbouring frames) / 255, "
    "without its static filter; higher is calmer, and a frozen clip has 1",
    "proxy_flow": "not VBench: mean of the largest 5 % of DIS optical flow between frames at 8 fps, in pixels of a "
    "frame whose shorter side is 256",
    "proxy_dynamic": "not VBench: share of clips that move by the rule of VBench's dynamic_degree, on DIS flow instead "
    "of RAFT",
    "proxy_warp_error": "not VBench: mean absolute difference in [0, 1] between a frame and the next one moved back "
    "along DIS flow; lower is smoother",
    "interval": "95 % percentile bootstrap of the mean over prompts (9999 resamples, fixed seed); clips of one prompt "
    "are averaged first; differences are paired by prompt and seed",
}

__all__ = [
    "DEFINITIONS",
    "LPIPS_SIDE",
    "MS_SSIM_SIDE",
    "SSIM_WINDOW",
    "Clock",
    "Fidelity",
    "Frames",
    "Interval",
    "Lpips",
    "Motion",
    "PeakMemory",
    "check_frames",
    "find_lpips",
    "mean_interval",
    "motion",
    "ms_ssim",
    "paired_interval",
    "psnr",
    "relative_l2",
    "ssim",
    "temporal_flickering",
]
