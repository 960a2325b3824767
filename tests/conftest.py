"""Settings every test shares."""

import os

import torch

# Without a GPU, Triton kernels run in Triton's interpreter; it has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing here may reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# One thread per test process: more of them only wait for each other where tests run side by side.
torch.set_num_threads(1)
