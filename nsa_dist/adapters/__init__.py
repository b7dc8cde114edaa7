"""One file or package a training framework; each is imported only by who uses it."""
