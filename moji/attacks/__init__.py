"""Adversarial prompts for the Moji benchmark: three searches and the prompt sets made of them."""
