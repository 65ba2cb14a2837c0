"""One set of weights on many machines: replicas that change their weights together, or not at all.

Nothing here knows what carries the messages. ``coordinator`` decides, ``book`` remembers what was decided, ``replica``
holds an engine and does as it is told, ``mailbox`` is a way between the two for transports on which only the replica
can call; ``onnx_refit.serve.ray`` puts them on Ray Serve.
"""
