"""``pipe.set_attn_processor`` exists after ``import dsattn``, whichever of dsattn and diffusers came first."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = "import sys, warnings; warnings.simplefilter('ignore')\n"
CHECK = """
import dsattn
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionMixin
assert DiffusionPipeline.set_attn_processor.__module__ == 'dsattn._diffusers_hook'
assert AttentionMixin.set_attn_processor.dsattn_aware
assert not any('_diffusers_hook' in type(finder).__module__ for finder in sys.meta_path)
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "order",
    [
        "import dsattn, diffusers",
        "import diffusers, dsattn",
        "import dsattn; from diffusers import WanPipeline",
        "import diffusers.models.attention, dsattn; import diffusers.pipelines.pipeline_utils",
        "import dsattn, importlib; from dsattn._diffusers_hook import install; install(); install()",
    ],
)
def test_either_import_order(order: str) -> None:
    run(order + CHECK)


def test_importing_dsattn_imports_no_diffusers() -> None:
    run("import dsattn\nassert 'diffusers' not in sys.modules and 'transformers' not in sys.modules")


def test_a_method_diffusers_brings_itself_is_kept() -> None:
    run(
        "from diffusers import DiffusionPipeline\n"
        "def own(self, processor): ...\n"
        "DiffusionPipeline.set_attn_processor = own\n"
        "import dsattn\n"
        "assert DiffusionPipeline.set_attn_processor is own"
    )


def test_other_models_and_processors_are_left_alone() -> None:
    run(
        "from diffusers.models.attention import AttentionMixin\n"
        "original = AttentionMixin.set_attn_processor\n"
        "import dsattn\n"
        "assert AttentionMixin.set_attn_processor.__wrapped__ is original\n"
        "from diffusers import FluxTransformer2DModel\n"
        "model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16,\n"
        "    num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8))\n"
        "processor = type(next(iter(model.attn_processors.values())))()\n"
        "model.set_attn_processor(processor)\n"
        "assert all(value is processor for value in model.attn_processors.values())\n"
        "mine = model.attn_processors\n"
        "model.set_attn_processor(mine)\n"
        "assert mine == {}\n"
        "before = model.attn_processors\n"
        "try:\n"
        "    model.set_attn_processor(dsattn.SparseAttnProcessor('topk'))\n"
        "except ValueError as error:\n"
        "    assert 'WanTransformer3DModel' in str(error)\n"
        "else:\n"
        "    raise AssertionError('an image transformer was accepted')\n"
        "assert model.attn_processors == before"
    )
