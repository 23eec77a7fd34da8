"""Numbers from images and scores: intervals, paired differences, FID."""
