"""What the demo and the engine tests run: a small real model, prompts of our own writing, and bursts of them."""

__all__ = ("convert", "engines", "model", "prompts", "report", "traffic", "watch")
