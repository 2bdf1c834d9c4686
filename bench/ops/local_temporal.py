"""The local temporal module: eager is the released form, compiled what an expert would write."""

from bench.ops.baseline import at_least

BASELINES = ()
X_EAGER, X_COMPILED = at_least(3.0), at_least(1.2)
