"""The first minutes on a GPU."""
