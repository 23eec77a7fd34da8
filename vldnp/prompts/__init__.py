"""Prompt sets as one table: shipped, public, or searched for against a model. They never say how
an image is made.
"""
