"""Images: listing, decoding, splits, preprocessing, augmentation, batches."""
