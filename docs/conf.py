from importlib.metadata import version as installed_version

project = "softcurve"
version = release = installed_version("softcurve")
copyright = "the softcurve authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"softcurve {release}"

# Formulas are plain text in Unicode: a page needs no script and nothing from the net.
myst_heading_anchors = 3
# Their callbacks are subclassed in softcurve.integrations, whose signatures the API reference shows without them.
autodoc_mock_imports = ["transformers", "lightning"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
