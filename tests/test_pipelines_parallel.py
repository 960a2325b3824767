"""Context parallelism: two CPU processes must give what one process gives."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsattn.pipelines.adapter import enable

from . import tiny_pipelines as tiny

WORKER = Path(__file__).parent / "ulysses_worker.py"


def two_processes(folder: Path, **options: Any) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / "found"
    arguments = ["2", str(port), str(out), json.dumps(options)]
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("first", ["parallel", "dsattn"])
def test_item12_two_ulysses_ranks_equal_one_process(tmp_path: Path, first: str) -> None:
    pipe, args = tiny.wan(num_attention_heads=4)
    args = {**args, **tiny.LONGER}
    stock = tiny.run(pipe, args)
    enable(pipe, **tiny.SPARSE)
    alone = tiny.run(pipe, args)
    assert not torch.allclose(alone, stock, atol=1e-3)
    for rank, found in enumerate(two_processes(tmp_path, parallel={"ulysses_degree": 2}, first=first)):
        assert found["error"] == ""
        torch.testing.assert_close(found["latents"], alone, rtol=1e-5, atol=1e-5)
        assert found["summary"] == {"calls": {"refresh": 12}, "fallbacks": {}}
        assert found["heads"] == [2 * rank] and found["tokens"] == [5 * 8 * 8]
        assert found["kept_config"]


def test_item12_ring_attention_is_refused_and_ulysses_named(tmp_path: Path) -> None:
    for found in two_processes(tmp_path, parallel={"ring_degree": 2}, first="dsattn"):
        assert "ring" in found["error"] and "ulysses_degree" in found["error"]
