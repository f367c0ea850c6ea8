"""Sphinx: ``pip install -e ".[docs]" && sphinx-build -W docs site``."""

import flops_lightning

project = "flops_lightning"
author = "the flops_lightning authors"
release = version = flops_lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"flops_lightning {version}"

autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Lightning documents its own hooks and arguments.
autodoc_inherit_docstrings = False
# The text of a class and that of its constructor belong together.
autoclass_content = "both"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
