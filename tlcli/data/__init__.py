"""Where images come from: listing, decoding, splits, preprocessing, augmentation, batches."""
