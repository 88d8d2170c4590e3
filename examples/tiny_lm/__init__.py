"""The parts of ``examples/tiny_lm.py``: text, model, objectives, training, measuring, the picture."""
