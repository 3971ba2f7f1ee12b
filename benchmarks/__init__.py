"""What the figures in the README rest on. Each module is a command that prints its table and writes it as JSON."""
