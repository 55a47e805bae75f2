"""Trimline: staged, distributed pretraining of language models that are cheaper to train and smaller to serve."""

__version__ = "0.1.0"
