"""Hook of the documentation's build: fills in generated tables, and stops on what must not be wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import docs_checks
import docs_tables
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

# Pictures of committed results, and their names in the site.
PICTURES = {
    name: f"assets/{name}" for name in ("frontier.png", "attention_study_maps.png", "attention_study_curves.png")
}


# The package with plain packages in place of its links, which the reader of docstrings does not follow.
SOURCE = docs_tables.ROOT / "out" / "docs-source"


def on_startup(**_: Any) -> None:
    """Lay out the source, before anything looks for it."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(docs_tables.ROOT / "dsattn", SOURCE / "dsattn", ignore=ignored)
    for name in ("kernels", "pipelines", "pipelines/tiny"):
        (SOURCE / "dsattn" / name / "__init__.py").touch()


def on_pre_build(config: Any, **_: Any) -> None:
    """Stop on a method without a page, or a command, option or name that does not exist."""
    if found := docs_checks.problems(Path(config.docs_dir)):
        raise PluginError("\n".join(found))


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures that lie with the results."""
    for name, uri in PICTURES.items():
        files.append(File.generated(config, uri, abs_src_path=str(docs_tables.RESULTS / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables a page asks for."""
    try:
        return docs_tables.fill(markdown)
    except (KeyError, ValueError, OSError) as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_post_build(config: Any, **_: Any) -> None:
    """Stop where a page would load something from elsewhere."""
    if found := docs_checks.external_resources(Path(config.site_dir)):
        raise PluginError("pages load from elsewhere:\n" + "\n".join(found))
