"""What training minimises: per-point losses and their derivatives in the outputs."""
