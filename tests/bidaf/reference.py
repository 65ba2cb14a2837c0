"""BiDAF in NumPy, straight from the paper and PyTorch's layouts: what the ONNX network is compared with."""

import numpy as np

from onnx_refit.samples.bidaf.text import WORD_LENGTH, tokenize


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class Reference:
    """Log-probabilities of the first and last word, in float64, with PyTorch's tensors and gate order (i f g o)."""

    def __init__(self, checkpoint, words, chars):
        self.w = {name: np.asarray(value, np.float64) for name, value in checkpoint.items()}
        self.words = {word: number for number, word in enumerate(words) if number != 1}
        self.chars = {char: number for number, char in enumerate(chars) if number != 1}

    def embed(self, text):
        rows = []
        for token in tokenize(text):
            letters = list(token.text[:WORD_LENGTH])
            numbers = [self.chars.get(letter, 1) for letter in letters] + [0] * (WORD_LENGTH - len(letters))
            vectors = self.w["char_emb"][numbers]  # [16, 8]
            windows = np.stack([vectors[place : place + 5].T for place in range(WORD_LENGTH - 4)])  # [12, 8, 5]
            responses = np.einsum("pci,fci->pf", windows, self.w["conv.weight"]) + self.w["conv.bias"]
            word = self.w["word_emb"][self.words.get(token.text.lower(), 1)]
            rows.append(np.concatenate([np.maximum(responses, 0).max(0), word]))
        x = np.stack(rows)
        for layer in (0, 1):
            both = x @ self.w[f"hw.{layer}.weight"].T + self.w[f"hw.{layer}.bias"]
            transform, gate = np.maximum(both[:, :150], 0), sigmoid(both[:, 150:])
            x = gate * transform + (1 - gate) * x
        return x

    def direction(self, layer, x, end):
        w, r = self.w[f"{layer}.weight_ih_{end}"], self.w[f"{layer}.weight_hh_{end}"]
        bias = self.w[f"{layer}.bias_ih_{end}"] + self.w[f"{layer}.bias_hh_{end}"]
        h, c, out = np.zeros(100), np.zeros(100), []
        for row in x:
            i, f, g, o = np.split(w @ row + r @ h + bias, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        return np.stack(out)

    def lstm(self, layer, x):
        backwards = self.direction(layer, x[::-1], "l0_reverse")[::-1]
        return np.concatenate([self.direction(layer, x, "l0"), backwards], 1)

    def scores(self, context, question):
        h, u = self.lstm("ctx_lstm", self.embed(context)), self.lstm("ctx_lstm", self.embed(question))
        w1, w2, w3 = self.w["att"]
        similarity = np.array([[w1 @ a + w2 @ b + w3 @ (a * b) for b in u] for a in h])
        to_question = softmax(similarity, 1) @ u
        to_context = softmax(similarity.max(1), 0) @ h
        merged = np.concatenate([h, to_question, h * to_question, h * to_context], 1)
        modelled = self.lstm("mod2", self.lstm("mod1", merged))
        start = np.concatenate([merged, modelled], 1) @ self.w["start.weight"][0] + self.w["start.bias"]
        summary = softmax(start, 0) @ modelled
        rows = np.repeat(summary[None], len(modelled), 0)
        last = self.lstm("end_lstm", np.concatenate([merged, modelled, rows, modelled * rows], 1))
        end = np.concatenate([merged, last], 1) @ self.w["end.weight"][0] + self.w["end.bias"]
        return np.log(softmax(start, 0)), np.log(softmax(end, 0))
