"""A deployment on Ray Serve: replicas on many machines whose weights change together (extra ``ray``).

handle = deploy("model.plan", store="versions", name="model", num_replicas=3)
answer = handle.infer({"x": x})
report = handle.refit("epoch7.safetensors", canary={"x": golden})
handle.rollback()

See docs/serving.md, "Across machines", for what is guaranteed.
"""

from onnx_refit.errors import MissingExtraError

try:
    import ray.serve  # noqa: F401 - says at once, and in words, that the extra is missing
except ImportError as error:
    raise MissingExtraError("ray[serve]", "ray", "a deployment across machines") from error

from onnx_refit.serve.ray.deployment import application, deploy, remove, start_coordinator
from onnx_refit.serve.ray.handle import ClusterAnswer, ClusterHandle, Session, connect
from onnx_refit.serve.ray.settings import ClusterSettings

__all__ = [
    "ClusterAnswer",
    "ClusterHandle",
    "ClusterSettings",
    "Session",
    "application",
    "connect",
    "deploy",
    "remove",
    "start_coordinator",
]
