"""The adversary: training attacks, and the checked maximiser δ* of the inner problem."""
