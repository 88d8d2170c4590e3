"""The modules of ``examples/tiny_lm.py``: text, model, objectives, training, measurements and the figure."""
