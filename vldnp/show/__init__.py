"""What people look at: figures, the viewer, the explorer, a run's report. It measures nothing."""
