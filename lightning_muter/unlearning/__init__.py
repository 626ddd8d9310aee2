"""Stage I, requests, correctors and bounds, without Lightning."""
