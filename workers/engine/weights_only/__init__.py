"""Jobs without a model: the tensors of the files are quantized one by one, and everything else is copied as it is."""

from workers.engine.weights_only.stage import chosen, run

__all__ = ["chosen", "run"]
