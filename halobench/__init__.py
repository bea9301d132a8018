"""halobench: attention-to-RNN surgery on Hugging Face decoders, and the measurements that prove it."""

__version__ = "0.1.0"
