"""Models of other formats in and out, and models made of the layers of pretrained ones. Needs no
transformers."""
