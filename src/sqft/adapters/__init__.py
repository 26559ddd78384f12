"""What hangs on a linear: configuration, layers, elastic ranks, saving and attaching, W' from folders."""
