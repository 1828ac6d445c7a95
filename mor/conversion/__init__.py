"""Models of other formats in and out, and models that start from pretrained layers."""
