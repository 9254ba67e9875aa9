"""Text to calibrate, select and measure on, as sequences of token ids: from files, or written by the model itself."""
