from mplug2_fast import ops
from tests.ops.suite import DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.beam_attention
