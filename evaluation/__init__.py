"""Accuracy on rendered flats: scenes with exact geometry, a model for them, and its training."""
