"""Device memory through the CUDA driver: any GPU will do, TensorRT is not needed."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

from onnx_refit.engine.tensorrt.device import DeviceBuffer, open_device
from onnx_refit.errors import EngineError

from .fake import FakeDevice


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_without_a_driver_the_error_says_what_is_missing() -> None:
    if has_driver():
        pytest.skip("there is a driver")
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        open_device()


def test_buffers_grow_and_give_their_memory_back() -> None:
    device = FakeDevice()
    buffer = DeviceBuffer(device, 10)
    first = buffer.reserve(8)
    assert buffer.reserve(10) == first, "there is room"
    buffer.reserve(100)
    assert len(device.memory) == 1, "the smaller piece was given back"
    del buffer
    gc.collect()
    assert not device.memory


@pytest.mark.gpu
def test_bytes_come_back_as_they_went() -> None:
    device = open_device()
    assert device.name
    assert device.compute_capability >= (5, 0)
    stream = device.create_stream()
    data = np.random.default_rng(0).integers(0, 255, 100_003).astype(np.uint8)
    one, two = DeviceBuffer(device, data.nbytes), DeviceBuffer(device, data.nbytes)
    device.copy_in(one.address, data, stream)
    device.copy_across(two.address, one.address, data.nbytes, stream)
    back = np.zeros_like(data)
    device.copy_out(back, two.address, stream)
    device.synchronize(stream)
    assert np.array_equal(back, data)
    one.release()
    two.release()
    device.destroy_stream(stream)
    with pytest.raises(EngineError, match="cuMemAlloc_v2 failed"):
        device.allocate(1 << 60)
