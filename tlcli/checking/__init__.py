"""What is wrong with a data set, before anything is trained on it: duplicates, labels, files, sizes, balance."""
