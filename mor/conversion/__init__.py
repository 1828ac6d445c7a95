"""Models of other formats in and out, and models that start from the layers of pretrained
ones."""
