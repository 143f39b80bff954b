"""Sphinx's configuration of the site that `make docs-site` builds without a network; warnings are errors."""

project = "Bitwright"
author = "The Bitwright authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "Bitwright"
html_copy_source = False
html_show_copyright = False

nitpicky = True
"""A reference that leads nowhere is a warning, and so an error."""
myst_heading_anchors = 4
"""Headings get the anchors that GitHub gives them, so that the same links work in both places."""
