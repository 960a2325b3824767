"""The package's shape: two top-level directories that ship as subpackages and shadow nothing."""

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_no_init_in_the_mapped_directories():
    for folder in ("kernels", "pipelines"):
        assert not list((ROOT / folder).rglob("__init__.py")), f"{folder}/__init__.py would shadow other packages"


def test_links_point_home():
    for name in ("kernels", "pipelines"):
        link = ROOT / "dsattn" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_package_list_equals_the_tree():
    folders = {"dsattn": ROOT / "dsattn", "dsattn.kernels": ROOT / "kernels", "dsattn.pipelines": ROOT / "pipelines"}
    found = set()
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            relative = path.parent.relative_to(folder)
            if relative.parts[:1] in (("kernels",), ("pipelines",)):
                continue
            found.add(".".join((package, *relative.parts)))
    assert found == set(SETTINGS["packages"])


def test_package_data_names_every_file_that_is_no_code():
    folders = {"dsattn": ROOT / "dsattn", "dsattn.html": ROOT / "dsattn" / "html", "dsattn.kernels": ROOT / "kernels"}
    for package, folder in folders.items():
        found = {path.name for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        found.discard("resource_budget.json")  # for CI, not for users
        assert found == set(SETTINGS["package-data"][package])


def test_root_does_not_shadow_the_kernels_package():
    """From the repository root, ``import kernels`` must not find our directory as a regular package."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in out
