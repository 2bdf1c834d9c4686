"""A layer of a decoding step at once, against its operators one by one."""

BASELINES = ()
