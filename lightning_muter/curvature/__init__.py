"""One point's curvature, and its sum over points."""
