"""Linear algebra: solutions with their status, one solver a file."""
