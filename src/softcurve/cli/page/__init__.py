"""What the HTML pages share: one style, charts for light and dark, formulas as MathML, nothing fetched."""
