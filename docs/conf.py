"""Sphinx's settings. build.py runs Sphinx."""

from lockkit.version import __version__

project = "lockkit"
release = __version__
copyright = "the lockkit authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
smartquotes = False  # they turn the dashes of options into others
highlight_language = "text"  # of blocks without a language
html_theme = "furo"
html_title = "lockkit"
html_static_path = ["static"]
html_css_files = ["small.css"]
html_copy_source = False
html_show_sphinx = False
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # links to headings, as GitHub names them
default_role = "literal"  # docstrings write `code`, as Markdown does
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" as a list
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
