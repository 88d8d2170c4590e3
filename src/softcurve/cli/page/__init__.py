"""HTML pages: sections, templates, charts for a light and a dark scheme, and formulas as SVG."""
