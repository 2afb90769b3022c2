"""Sphinx's configuration: `make docs` builds the site offline and treats warnings as errors."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "pygpt"
author = "the pygpt developers"
copyright = "2026, the pygpt developers"
release = re.search(r'__version__ = "([^"]+)"', (ROOT / "pygpt/__init__.py").read_text(encoding="utf-8"))[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 3
nitpicky = False

html_theme = "furo"
html_title = f"pygpt {release}"
html_static_path = []

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False
default_role = "py:obj"  # `name` in a docstring links to it
