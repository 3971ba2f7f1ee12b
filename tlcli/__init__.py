"""Transfer learning for image classification from the shell, driven by YAML."""

__version__ = "0.2.0"
