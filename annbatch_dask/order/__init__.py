"""The order of rows as a function of (seed, epoch, position), and how it is shared out. Opens nothing."""
