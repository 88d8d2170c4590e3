"""The mathematics: what is minimised, in closed form, on dense logits."""
