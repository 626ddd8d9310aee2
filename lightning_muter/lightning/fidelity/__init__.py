"""Whether a memory would be of the problem that training solves (docs/theory.md).

Each file holds one question, as a plain object that the callback's hooks feed: the points, the
loss and the outputs, the steps, and the frozen part. `watch` puts them together.
"""
