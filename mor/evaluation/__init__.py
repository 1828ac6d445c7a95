"""How good a model is: likelihood of text, benchmarks."""
