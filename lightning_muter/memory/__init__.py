"""The memory as a value, its points, and its folder."""
