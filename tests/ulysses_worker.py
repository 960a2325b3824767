"""One of two processes of a context-parallel run on CPU; started by test_pipelines_parallel.py.

``torchrun``-like arguments: rank, world size, port, output file, then options as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import tiny_pipelines as tiny


def enable_context_parallel(model: Any, rank: int, world: int, **config: Any) -> None:
    """``model.enable_parallelism`` without its look-up of an accelerator, which a CPU-only machine lacks."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    context = ContextParallelConfig(**config)
    mesh = dist.device_mesh.init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=context)
    parallel.setup(rank, world, torch.device("cpu"), mesh=mesh)
    model._parallel_config = parallel
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, context, model._cp_plan)


def main(rank: int, world: int, port: int, out: str, options: dict[str, Any]) -> None:
    from dsattn.pipelines.adapter import enable

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    pipe, args = tiny.wan(num_attention_heads=4)
    engine = tiny.recorder()
    found: dict[str, Any] = {"error": ""}
    try:
        if options["first"] == "parallel":
            enable_context_parallel(pipe.transformer, rank, world, **options["parallel"])
        handle = enable(pipe, engine)
        if options["first"] == "dsattn":
            enable_context_parallel(pipe.transformer, rank, world, **options["parallel"])
        found["latents"] = tiny.run(pipe, {**args, **tiny.LONGER})
        found["summary"] = {name: handle.summary()[name] for name in ("calls", "fallbacks")}
        found["heads"] = sorted({call.first_head for call in engine.calls})
        found["tokens"] = sorted({call.grid.tokens for call in engine.calls})
        handle.remove()
        processor = pipe.transformer.blocks[0].attn1.processor
        found["kept_config"] = processor._parallel_config is pipe.transformer._parallel_config
    except RuntimeError as error:
        found["error"] = str(error)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
