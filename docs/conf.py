"""The documentation site. Everything that the code can say about itself is made from the code, by pages.py."""

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import docstrings  # noqa: E402
import pages  # noqa: E402
import torch  # noqa: E402

import saccade  # noqa: E402

torch.set_num_threads(1)  # the examples are small: more threads would wait for each other

project = "saccade"
author = "The saccade maintainers"
copyright = author
release = version = saccade.__version__
html_title = f"saccade {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "generated/parts", "gallery/*.py", "gallery/*.json"]
default_role = "py:obj"  # `name` links where the name is ours, and is set as code elsewhere
suppress_warnings = ["config.cache"]  # the gallery's settings hold functions
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
maximum_signature_line_length = 88

autodoc_inherit_docstrings = False  # an overridden method is described where it is defined
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "image_srcset": ["2x"],
    "capture_repr": (),
    "download_all_examples": False,
    "notebook_extensions": set(),
    "show_signature": False,
    "min_reported_time": 3600,  # a time that depends on the machine teaches nothing
    "write_computation_times": False,
}


def setup(app: Any) -> None:
    """Write the generated pages, and have autodoc read docstrings as this project writes them."""
    pages.write_pages(DOCS / "generated")
    app.connect("autodoc-process-docstring", docstrings.add_private_bases, priority=100)
    app.connect("autodoc-process-docstring", docstrings.restructure, priority=200)  # before napoleon
    app.connect("autodoc-skip-member", docstrings.skip_tuple_fields)
