"""What results mean: the paper's claims, tables, causes of failures. It computes no image."""
