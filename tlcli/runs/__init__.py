"""The run directory: the only code that knows what is in outputs/."""
