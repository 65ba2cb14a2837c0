"""The training code's network, the exported original and the prepared, refitted engine give the same answers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from onnx_refit.model.load import load_model  # noqa: E402
from onnx_refit.model.verify import Runner  # noqa: E402
from onnx_refit.samples.bidaf import bundle, checkpoints  # noqa: E402
from onnx_refit.samples.bidaf.answering import best_span  # noqa: E402
from onnx_refit.samples.bidaf.demo import dev_questions  # noqa: E402
from onnx_refit.samples.bidaf.export import export_model  # noqa: E402
from onnx_refit.samples.bidaf.text import WORD_LENGTH  # noqa: E402
from onnx_refit.samples.bidaf.training.batches import DeviceSplit, length_order  # noqa: E402
from onnx_refit.samples.bidaf.training.corpus import Corpus, DevTexts, Split  # noqa: E402
from onnx_refit.samples.bidaf.training.model import Bidaf  # noqa: E402
from onnx_refit.samples.bidaf.vocabulary import Passage, feeds  # noqa: E402

pytestmark = pytest.mark.torch

QUESTIONS = 200


def corpus_of(passages, asked, weights):
    """The questions as the training code reads them: each question with a paragraph of its own."""
    vocabulary = bundle.bundled_vocabulary()
    words = {word: number for number, word in enumerate(vocabulary.words) if number != 1}
    chars = {char: number for number, char in enumerate(vocabulary.chars) if number != 1}
    types: dict[str, int] = {}

    def flat(texts):
        numbers = [types.setdefault(token.text, len(types)) for text in texts for token in text.tokens]
        return np.array(numbers, np.int32), np.cumsum([0, *(len(text.tokens) for text in texts)]).astype(np.int32)

    contexts, context_offsets = flat(passages)
    questions, question_offsets = flat(asked)
    none = np.full(len(passages), -1, np.int32)
    split = Split(
        contexts, context_offsets, questions, question_offsets, np.arange(len(passages), dtype=np.int32), none, none
    )
    type_chars = np.zeros((len(types), WORD_LENGTH), np.uint8)
    for text, number in types.items():
        letters = [chars.get(letter, 1) for letter in text[:WORD_LENGTH]]
        type_chars[number, : len(letters)] = letters
    return Corpus(
        words=list(vocabulary.words),
        chars=list(vocabulary.chars),
        tuned=len(vocabulary.words),
        word_vectors=weights["word_emb"].astype(np.float16),
        type_words=np.array([words.get(text.lower(), 1) for text in types], np.int32),
        type_chars=type_chars,
        train=split,
        dev=split,
        dev_texts=DevTexts([], none, none, [], {}),
        notes={},
    )


@pytest.fixture
def one_thread():
    """More threads of PyTorch would wait for those of ONNX Runtime at each step of an LSTM."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_200_dev_questions(engine, tmp_path, one_thread):
    weights = checkpoints.load_checkpoint()
    questions = dev_questions(QUESTIONS)
    contexts = [Passage.of(question.context) for question in questions]
    asked = [Passage.of(question.text) for question in questions]
    corpus = corpus_of(contexts, asked, weights)
    network = Bidaf(corpus)
    network.load(weights)
    network.eval()
    split = DeviceSplit(corpus.dev, torch.device("cpu"))
    expected = {}
    with torch.no_grad():
        for examples in length_order(split.context_length, 16):
            batch = split.batch(examples)
            start, end = (logits.log_softmax(1).numpy() for logits in network(batch))
            for row, example in enumerate(batch.examples):
                length = len(contexts[example].tokens)
                expected[int(example)] = start[row, :length], end[row, :length]
    assert len(expected) == QUESTIONS

    exported = export_model(weights, bundle.bundled_vocabulary(), tmp_path / "bidaf-original.onnx")
    original = Runner(load_model(exported.path))
    # the engine gets there by a detour: through an early checkpoint and back
    engine.refit(bundle.checkpoint_weights(bundle.checkpoint_names()[0]))
    engine.refit(bundle.checkpoint_weights())
    disagreements = []
    for number, (context, question) in enumerate(zip(contexts, asked, strict=True)):
        start, end = expected[number]
        case = feeds(context, question)
        for name, got in (("original", original.run(case)), ("engine", engine.run(case))):
            np.testing.assert_allclose(np.exp(got["start_scores"][0]), np.exp(start), atol=5e-4)
            np.testing.assert_allclose(np.exp(got["end_scores"][0]), np.exp(end), atol=5e-4)
            if (int(got["start_pos"][0]), int(got["end_pos"][0])) != best_span(start, end)[:2]:
                disagreements.append((name, questions[number].id))
    assert disagreements == []
