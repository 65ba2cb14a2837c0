"""The same model behind other servers: each file is what its documentation shows, no more.

Every peer runs ``$PEER_MODEL`` with ONNX Runtime and one inference thread. What it needs is in ``PEER.txt``.
"""
