"""Settings every test shares."""

import os

import torch

# Without a GPU, Triton kernels run in Triton's interpreter; it has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing here may reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
