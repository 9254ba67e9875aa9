"""One adapter a kernel library, the torch reference, and the chooser."""
