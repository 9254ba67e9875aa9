"""What lets work last for hours: progress, a journal of finished steps, a clean stop, processes that share it."""
