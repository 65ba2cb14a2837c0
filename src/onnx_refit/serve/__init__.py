"""The server: inference and refit over the Open Inference Protocol (extra ``serve``).

Nothing in it is imported by the rest of the library but the command line; see docs/serving.md for what it does and
why it is built as it is.
"""
