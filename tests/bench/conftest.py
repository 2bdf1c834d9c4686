from functools import partial

import pytest
import torch

from bench import measure, scaling, waterfall
from bench.process import Process


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """One thread: tiny models do not need more, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def forked():
    """Workers start in milliseconds, by a fork of a process that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (measure, scaling, waterfall):
            patch.setattr(module, "Process", partial(Process, preloaded=True))
        yield
