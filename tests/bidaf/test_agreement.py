"""PyTorch, the exported original and the prepared, refitted engine give the same answers."""

import numpy as np
import pytest

from onnx_refit.model.verify import Runner
from onnx_refit.samples.bidaf import bundle, checkpoints
from onnx_refit.samples.bidaf.answering import best_span
from onnx_refit.samples.bidaf.demo import dev_questions
from onnx_refit.samples.bidaf.vocabulary import Passage, feeds

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # more would wait for the threads of ONNX Runtime at each step of an LSTM
pytestmark = [pytest.mark.torch]


class TorchBidaf:
    """The network out of PyTorch's own layers, one question at a time, on the shipped weights."""

    def __init__(self, weights):
        self.w = {name: torch.from_numpy(value) for name, value in weights.items()}
        self.lstms = {}
        for layer, features in (("ctx_lstm", 150), ("mod1", 800), ("mod2", 200), ("end_lstm", 1400)):
            lstm = torch.nn.LSTM(features, 100, bidirectional=True)
            lstm.load_state_dict({name.split(".")[1]: w for name, w in self.w.items() if name.startswith(layer + ".")})
            self.lstms[layer] = lstm

    def embed(self, words, chars):
        f, w = torch.nn.functional, self.w
        letters = w["char_emb"][chars].transpose(1, 2)
        features = f.relu(f.conv1d(letters, w["conv.weight"], w["conv.bias"])).amax(2)
        x = torch.cat([features, w["word_emb"][words]], 1)
        for layer in (0, 1):
            transform, gate = f.linear(x, w[f"hw.{layer}.weight"], w[f"hw.{layer}.bias"]).chunk(2, 1)
            gate = torch.sigmoid(gate)
            x = gate * f.relu(transform) + (1 - gate) * x
        return x

    def run(self, layer, x):
        return self.lstms[layer](x[:, None])[0][:, 0]

    @torch.no_grad()
    def __call__(self, context, question):
        f, w = torch.nn.functional, self.w
        h, u = self.run("ctx_lstm", self.embed(*context)), self.run("ctx_lstm", self.embed(*question))
        w1, w2, w3 = w["att"]
        s = (h @ w1)[:, None] + (u @ w2)[None] + (h * w3) @ u.T
        c2q, q2c = s.softmax(1) @ u, s.amax(1).softmax(0) @ h
        g = torch.cat([h, c2q, h * c2q, h * q2c], 1)
        m = self.run("mod2", self.run("mod1", g))
        start = f.linear(torch.cat([g, m], 1), w["start.weight"], w["start.bias"])[:, 0]
        a = (start.softmax(0) @ m).expand_as(m)
        m2 = self.run("end_lstm", torch.cat([g, m, a, m * a], 1))
        end = f.linear(torch.cat([g, m2], 1), w["end.weight"], w["end.bias"])[:, 0]
        return start.log_softmax(0).numpy(), end.log_softmax(0).numpy()


def test_200_dev_questions(engine, original_model):
    vocabulary = bundle.bundled_vocabulary()
    words = {word: number for number, word in enumerate(vocabulary.words) if number != 1}
    chars = {char: number for number, char in enumerate(vocabulary.chars) if number != 1}

    def numbers(passage):
        return (
            torch.tensor([words.get(word, 1) for word in passage.words.ravel().tolist()]),
            torch.tensor([[chars.get(c, 1) for c in row] for row in passage.chars[:, 0, 0].tolist()]),
        )

    network = TorchBidaf(checkpoints.load_checkpoint())
    original = Runner(original_model)
    # the engine gets there by a detour: through an early checkpoint and back
    engine.refit(bundle.checkpoint_weights(bundle.checkpoint_names()[0]))
    engine.refit(bundle.checkpoint_weights())
    disagreements = []
    for question in dev_questions(200):
        context, asked = Passage.of(question.context), Passage.of(question.text)
        start, end = network(numbers(context), numbers(asked))
        expected = best_span(start, end)[:2]
        case = feeds(context, asked)
        for name, got in (("original", original.run(case)), ("engine", engine.run(case))):
            np.testing.assert_allclose(np.exp(got["start_scores"][0]), np.exp(start), atol=2e-4)
            np.testing.assert_allclose(np.exp(got["end_scores"][0]), np.exp(end), atol=2e-4)
            if (int(got["start_pos"][0]), int(got["end_pos"][0])) != expected:
                disagreements.append((name, question.id))
    assert disagreements == []
