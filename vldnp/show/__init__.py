"""What people look at: figures, the viewer, the explorer. It measures nothing."""
