"""Sphinx reads this; `docs/site/stage.py` writes the pages that it is run on."""

import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

project = "zoo"
release = _project["version"]
html_title = f"zoo {release}"
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4  # links as the repository's own pages have them: runs.md#to-go-on
suppress_warnings = ["myst.header", "misc.highlighting_failure"]  # a model card begins with its front matter
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["zoo.css"]
html_show_sourcelink = False
html_copy_source = False
add_module_names = False
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# Furo takes its fonts from the reader's machine; nothing is loaded from anywhere else.
html_theme_options = {"navigation_with_keys": True}
