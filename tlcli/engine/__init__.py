"""Decisions of a run, cached activations, the training loop, and evaluation."""
