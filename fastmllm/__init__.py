"""The visual half of a multimodal LLM at the speed of light, for training and for inference."""

__version__ = "0.1.0"
