"""A decode step: its buffers, the views of the cache, and what a layer does in it."""
