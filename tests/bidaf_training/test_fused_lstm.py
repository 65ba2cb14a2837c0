"""The CUDA kernels against cuDNN: values and every gradient, over sequences of different lengths."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from onnx_refit.samples.bidaf.training import fused_lstm, model  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not fused_lstm.available(), reason="needs a CUDA device and CuPy"),
]


@pytest.mark.parametrize(("features", "longest"), [(150, 400), (800, 57), (1400, 1)])
def test_the_kernels_agree_with_cudnn(monkeypatch, features, longest):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(features)
    random = np.random.default_rng(features)
    lengths = np.append(np.sort(random.integers(1, longest + 1, 40))[::-1], 1)
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device="cuda")
    layer = model._FlatLstm(features).cuda()
    x = torch.randn(int(lengths.sum()), features, device="cuda", requires_grad=True)
    weight = torch.randn(len(x), 2 * model.HIDDEN, device="cuda")

    def run(fused):
        monkeypatch.setattr(model, "available", lambda: fused)
        out = layer(x, offsets, lengths)
        return [out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])]

    for ours, reference in zip(run(True), run(False), strict=True):
        assert torch.isfinite(ours).all()
        if longest == 1 and not reference.any():
            assert not ours.any()
        else:
            assert (ours - reference).norm() <= 1e-5 * reference.norm()


def test_a_hidden_size_that_does_not_fit_is_refused():
    x = torch.zeros(3, 4, device="cuda")
    with pytest.raises(ValueError, match="multiples of 4"):
        fused_lstm.bidirectional_lstm(x, x, torch.zeros(2, 12, 3, device="cuda"), x, x)
