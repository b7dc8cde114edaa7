"""One file a training framework; each is imported only by who uses it."""
