import subprocess

from bench import machine


def test_the_environment_names_the_commit_outside_a_checkout(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.delenv("MPLUG2_FAST_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("MPLUG2_FAST_COMMIT", "abc")
    assert machine.commit() == "abc"
