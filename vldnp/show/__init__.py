"""Figures, image grids, the viewer, the explorer and tables. Nothing is measured here."""
