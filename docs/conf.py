"""The configuration of the documentation; `make docs` builds it."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))

project = "softcurve"
version = release = installed_version("softcurve")
copyright = "the softcurve authors"

extensions = [
    "myst_parser", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx_design",
    "sphinx_gallery.gen_gallery", "api", "commands", "explorable", "formulas",
]  # fmt: skip
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "gallery/*.zip"]
html_theme = "furo"
html_title = f"softcurve {release}"
html_static_path = ["_static"]
html_css_files = ["softcurve.css"]
html_copy_source = html_show_sourcelink = False

# A page needs no script and nothing from another host to show a formula.
html_math_renderer = "svg"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_dmath_double_inline = False
myst_update_mathjax = False
myst_heading_anchors = 3

# Their callbacks are subclassed in softcurve.integrations, whose signatures the API reference shows without them.
autodoc_mock_imports = ["transformers", "lightning"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autosummary_generate = False
# The long unions of these two are shown by their names, which the API reference explains.
autodoc_type_aliases = {name: f"softcurve.typing.{name}" for name in ("Number", "Integer")}
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
viewcode_line_numbers = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The examples take minutes each, so they are not run: docs/pictures has the figures that they have written.
sphinx_gallery_conf = {
    "examples_dirs": str(DOCS.parent / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"(?!)",
    "plot_gallery": False,
    "nested_sections": False,
    "notebook_extensions": set(),
    "within_subsection_order": "FileNameSortKey",
    "copyfile_regex": "",
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "backreferences_dir": None,
}
