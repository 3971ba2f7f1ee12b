"""Backbones and their weights: from a spec to a classifier that is ready to train."""
