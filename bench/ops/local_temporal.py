"""The local temporal module: eager is the released form, compiled what an expert would write."""

BASELINES = ()
