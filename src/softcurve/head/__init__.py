"""The linear head, tile by tile: losses and their derivatives without the N×C logits."""
