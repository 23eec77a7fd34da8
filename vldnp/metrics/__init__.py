"""Numbers from images and their scores: intervals, paired differences, FID and KID, Pareto fronts.
It generates nothing and reads no run folder.
"""
