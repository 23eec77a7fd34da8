"""What is run: profiles, grids, run folders, sweeps, tuning, timing. Only here are run folders read
and written; what results mean is said in `analysis`.
"""
