"""Training and evaluation of the benchmark's models. Nothing imports it."""
