"""One step of beam search against PyTorch's log-softmax and top-k."""

BASELINES = ()
