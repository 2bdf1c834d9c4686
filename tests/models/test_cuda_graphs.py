"""When captured graphs are out of date, and how programs run without graphs."""

import copy
import pickle

import torch
from torch import nn

from mplug2_fast.generation.cuda_graphs import CudaGraphRunner, ModelLayout
from tests.nn.changes import parametrisation, subclass, wrapper


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def test_writing_weights_in_place_keeps_graphs():
    module = model()
    known = ModelLayout(module)
    with torch.no_grad():
        module[0].weight.mul_(2)
    module.load_state_dict(model().state_dict())
    assert known.is_current()


def test_moving_weights_or_replacing_modules_drops_graphs():
    for change in (
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
        lambda m: setattr(m[2][0], "bias", None),
        lambda m: m.double(),
        lambda m: setattr(m[1], "running_mean", torch.zeros(4)),
        lambda m: m[2].__setitem__(0, nn.Linear(4, 2)),
        lambda m: m[2].append(nn.ReLU()),
        lambda m: setattr(m[0].weight, "data", m[0].weight.data.as_strided((4, 3), (1, 4))),
        lambda m: setattr(m[1].running_var, "data", m[1].running_var.view(torch.int32)),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    ):
        module = model()
        known = ModelLayout(module)
        change(module)
        assert not known.is_current()


def test_a_program_runs_until_it_is_done():
    seen = []

    def program(x, nothing):
        assert nothing is None
        for step in range(5):
            seen.append(step)
            yield x == step, (x + step,)

    (result,) = CudaGraphRunner().run(nn.Identity(), "count", program, [torch.tensor(3), None], 5)
    assert result == 6
    assert seen == [0, 1, 2, 3]


def test_copies_keep_the_setting():
    runner = CudaGraphRunner()
    runner.enabled = False
    assert not copy.deepcopy(runner).enabled
    assert not pickle.loads(pickle.dumps(runner)).enabled


def test_hooks_and_foreign_code_prevent_capture():
    assert not ModelLayout(model()).must_call_modules()
    for change in (
        lambda m: m[0].register_forward_hook(print),
        lambda m: m[0].register_forward_pre_hook(print, with_kwargs=True),
        lambda m: m[2].register_full_backward_hook(print),
        lambda m: m[2].register_full_backward_pre_hook(print),
        lambda m: setattr(m[0], "forward", m[0].forward),
        lambda m: subclass(m, "2.0", []),
        lambda m: parametrisation(m, "0", []),
        lambda m: wrapper(m, "0", []),
    ):
        module = model()
        known = ModelLayout(module)
        change(module)
        assert (ModelLayout(module) if not known.is_current() else known).must_call_modules()


def test_global_hooks_prevent_capture():
    known = ModelLayout(model())
    handle = torch.nn.modules.module.register_module_forward_hook(print)
    assert known.must_call_modules()
    handle.remove()
    assert not known.must_call_modules()
