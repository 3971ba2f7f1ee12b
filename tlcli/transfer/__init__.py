"""What transfer is: which weights train, at which rates, and the proof that the others did not."""
