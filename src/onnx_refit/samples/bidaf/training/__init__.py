"""Training of the sample's network: data, model, loop and checkpoints. Needs the extra ``train`` (PyTorch).

The modules from the data to the weights: :mod:`.preprocess` turns SQuAD and GloVe into a :class:`.corpus.Corpus`,
:mod:`.batches` lays it out on a device, :mod:`.model` is the network, :mod:`.loop` trains it, :mod:`.labels` lets
several trained networks teach another, :mod:`.evaluation` scores, :mod:`.state` keeps what a resumed run needs.
"""
