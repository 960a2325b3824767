"""Imports point one way, and ``import dsattn`` needs torch only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
OPTIONAL = ("diffusers", "transformers", "triton", "xformers", "sklearn", "skimage", "imageio", "typer", "rich", "yaml")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_optional_packages():
    run(
        BLOCK.format(blocked=OPTIONAL)
        + """
import dsattn, torch
grid = dsattn.VideoGrid(3, 8, 8)
q = torch.randn(1, grid.tokens, 2, 32)
engine = dsattn.Engine("topk", density=.3, impl="torch")
assert engine(q, q, q, dsattn.Call(0, 0, grid)).shape == q.shape
try:
    dsattn.attend(q, q, q, dsattn.plan(q, q, q, dsattn.Call(0, 0, grid)), impl="triton")
except dsattn.ImplUnavailableError as error:
    assert "pip install triton" in str(error), error
else:
    raise SystemExit("triton ran without triton")
"""
    )


def test_does_not_import_optional_packages():
    loaded = run(f"import dsattn, sys; print([m for m in {OPTIONAL!r} if m in sys.modules])")
    # torch itself imports triton where it is installed.
    torch_alone = run(f"import torch, sys; print([m for m in {OPTIONAL!r} if m in sys.modules])")
    assert loaded == torch_alone


# Lower layers first; a module may import only from its own or a lower layer.
LAYERS = [
    ("errors", "grid", "block_plan", "config", "orders", "presets", "verdict", "wording"),
    ("kernels",),
    ("head_profile", "mix", "profiler", "methods"),
    ("functional",),
    ("schedule", "state", "stats"),
    ("engine",),
    ("pipelines",),
    ("thumbnails",),
    (
        "profile_report",
        "profile_pictures",
        "call_maps",
        "html",
        "inputs",
        "metrics",
        "quality",
        "video",
        "report",
        "report_diff",
        "report_file",
        "report_view",
        "measure",
        "survey",
        "compare",
        "cli",
        "__main__",
        "_diffusers_hook",
    ),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The package's own __init__ gathers names from all layers; the tiny model's CLI helpers none.
FILES = [
    path
    for folder in ("dsattn", "kernels", "pipelines")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name in ("methods", "cli")
]


def layer(path: Path) -> int:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = parts[1] if parts[0] == "dsattn" else parts[0]
    assert name in LEVEL, f"{path.relative_to(ROOT)} has no layer: add it to LAYERS"
    return LEVEL[name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    import ast

    own = layer(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "dsattn" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "dsattn" and rest and rest.split(".")[0] in LEVEL:
                assert LEVEL[rest.split(".")[0]] <= own, f"{path.name} imports {name}, which stands above it"
            allowed = {"triton": "kernels", "diffusers": "pipelines", "transformers": "pipelines"}
            if root in allowed:
                assert path.relative_to(ROOT).parts[0] == allowed[root], f"{path} imports {root}"
