"""The Moji benchmark: a synthetic world of scenes, and the training of its models."""
