"""Transfer: which weights train, at which learning rates, and the check that the others did not change."""
