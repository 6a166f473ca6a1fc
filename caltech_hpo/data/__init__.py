"""Image files to batches on the device."""
