"""The Moji benchmark: synthetic scenes, and the training of its models."""
