"""docs/performance.md and the headline table, from the committed results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import bulk, machine, table, targets, waterfall
from bench.committed import File, Machine
from bench.row import Baseline, Results
from bench.targets import MET, MISSED, NOT_MEASURED, STATED, Judged, Target

NOBODY = {"cpu": "a CPU", "cuda": "NVIDIA H200"}
"""The machine of targets for a device without committed results."""


def page(found: Sequence[Machine], at: Path) -> str:
    """The whole page. `at` is its folder; paths of pictures are relative to it."""
    parts = [
        "# Performance",
        "`python bench/report.py` writes this page from [bench/results](../bench/results), which has a folder per "
        "machine. To add a run: `python bench/run.py --json bench/results/MACHINE/NAME.json` with a familiar name for "
        "the machine, then `python bench/report.py`. See [bench/row.py](../bench/row.py) for column definitions and "
        "[bench/targets.py](../bench/targets.py) for the targets.",
        _contents(found),
        "## Targets",
        "Ratios compare implementations that took turns in one run. Shares are of ceilings measured in the same run. "
        "*Reference* is the official algorithm, eager, in float32. *Compiled* is PyTorch's own operators under "
        "`torch.compile`, in the same dtype, with cached keys and values.",
    ]
    judged = {device: _judged(found, device) for device in NOBODY}
    for device, title in (("cpu", "On CPUs"), ("cuda", "On a GPU")):
        parts += [f"### {title}", _target_table(judged[device]), _counted(judged[device], found)]
    everyone = [pair for device in judged.values() for pair in device.items()]
    parts += ["### Missed", _missed(everyone), "### Not measured", _not_measured(everyone)]
    for each in found:
        parts += [f"## {each.name}", _about(each)]
        for file in each.files:
            parts += [f"### {each.name}: {file.name}", *section(file), _picture(file, at)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def headline(found: Iterable[Machine]) -> str:
    """Captioning one video end to end, on each machine."""
    head = ("machine", "dtype", "reference", "compiled peer", "mplug2_fast", "× reference", "× compiled peer")
    head += ("% of GEMM ceiling", "peak memory", "of the reference", "of the peer")
    lines, notes = [], []
    for each in found:
        for run, row in sorted(each.captioning(), key=lambda pair: (pair[1].key.sizes, pair[1].key.dtype)):
            reference, compiled = (row.baselines.get(name) for name in ("reference", "compiled"))
            key = row.key
            batch = next((part for part in key.sizes.split(", ") if part.startswith("batch ")), "batch 1")
            name = each.name if batch == "batch 1" else f"{each.name}, {batch}"
            lines.append(
                (
                    name,
                    key.dtype,
                    _seconds(reference),
                    _seconds(compiled),
                    table.seconds(row.seconds),
                    table.ratio(row.ratio("reference")),
                    table.ratio(row.ratio("compiled")),
                    _shown(lambda v: f"{v:.0f}%", row.percent_of_ceiling if row.bound == "compute" else None),
                    _gigabytes(row.peak_memory_bytes),
                    _gigabytes(reference and reference.peak_memory_bytes),
                    _gigabytes(compiled and compiled.peak_memory_bytes),
                )
            )
            about = f"{each.name}: {machine.words(run.machine, run.versions)}"
            notes.append(f"{about}, at {run.versions.get('commit')}.")
    if not lines:
        return "Not measured yet.\n"
    return _markdown(head, lines, text=2) + "\n\n" + "\n".join(f"- {note}" for note in dict.fromkeys(notes)) + "\n"


def _contents(found: Sequence[Machine]) -> str:
    lines = ["- [Targets](#targets)"]
    for each in found:
        files = ", ".join(f"[{file.name}](#{_anchor(f'{each.name}: {file.name}')})" for file in each.files)
        lines.append(f"- [{each.name}](#{_anchor(each.name)}): {files}")
    return "\n".join(lines)


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _judged(found: Iterable[Machine], device: str) -> dict[str, list[Judged]]:
    """Machine -> all targets of the device."""
    measured = {each.name: targets.judge(each.runs, device) for each in found if each.device == device and each.runs}
    return measured or {NOBODY[device]: targets.judge([], device)}


def _target_table(judged: Mapping[str, list[Judged]]) -> str:
    lines = []
    for together in zip(*judged.values(), strict=True):
        target = together[0].target
        lines.append((target.work, target.dtype, target.wanted, *map(_cell, together)))
    return _markdown(("work", "dtype", "wanted", *judged), lines, text=3)


def _cell(judged: Judged) -> str:
    return judged.verdict if judged.figure is None else f"{judged.figure}, {judged.verdict}"


def _counted(judged: Mapping[str, list[Judged]], found: Iterable[Machine]) -> str:
    """The verdicts of each machine counted, and the notes of its runs."""
    lines = []
    for name, all_of in judged.items():
        counts = ", ".join(f"{_count(all_of, verdict)} {verdict}" for verdict in (MET, MISSED, STATED, NOT_MEASURED))
        lines.append(f"- {name}: {counts}")
        for each in found:
            if each.name == name:
                lines += [f"    - {note}" for note in dict.fromkeys(note for run in each.runs for note in run.notes)]
    return "\n".join(lines)


def _count(judged: Iterable[Judged], verdict: str) -> int:
    return sum(each.verdict == verdict for each in judged)


def _missed(everyone: Iterable[tuple[str, list[Judged]]]) -> str:
    lines = [
        f"- {name}: {each.target.work}, {each.target.dtype}: {each.figure}, wanted {each.target.wanted}"
        for name, judged in everyone
        for each in judged
        if each.verdict == MISSED
    ]
    return "\n".join(lines) or "None."


def _not_measured(everyone: Iterable[tuple[str, list[Judged]]]) -> str:
    lines = []
    for name, judged in everyone:
        left = [each.target for each in judged if each.verdict == NOT_MEASURED]
        works = dict.fromkeys(f"{target.work}: {target.wanted} ({_dtypes(target, left)})" for target in left)
        if len(left) == len(judged):
            lines.append(f"- {name}: none of the targets")
        elif left:
            lines += [f"- {name}:", *(f"    - {work}" for work in works)]
    return "\n".join(lines) or "None."


def _dtypes(target: Target, among: Iterable[Target]) -> str:
    same = (each for each in among if (each.work, each.quantity.of) == (target.work, target.quantity.of))
    return ", ".join(dict.fromkeys(each.dtype for each in same))


def _about(each: Machine) -> str:
    described = each.files[0].machine
    parts = [described["gpu"]] if described.get("gpu") else []
    parts += [
        f"{described['cpu']}, {described['cores']} cores",
        " ".join(described["simd"]),
        f"{described['memory_bytes'] / 1e9:.0f} GB of memory",
        described["os"],
    ]
    return "; ".join(filter(None, parts)) + "."


def section(file: File) -> list[str]:
    """Table, notes and commands of one file."""
    return {"rows": _rows, "waterfall": _waterfall, "scaling": _scaling, "bulk": _bulk}[file.kind](file.held)


def _picture(file: File, at: Path) -> str:
    if file.picture is None:
        return ""
    kind = {"rows": "Roofline"}.get(file.kind, file.kind.capitalize())
    return f"![{kind}: {file.name}]({Path(os.path.relpath(file.picture, at)).as_posix()})"


def _rows(results: Results) -> list[str]:
    parts = [table.markdown(results), _built(results.versions), *results.notes]
    if results.failed:
        parts.append("Failed:\n\n" + "\n".join(f"- {key}: {why}" for key, why in results.failed.items()))
    return [*parts, _commands(row.command for row in results.rows)]


def _waterfall(results: Mapping[str, Any]) -> list[str]:
    parts = [waterfall.markdown(results), _built(results["versions"])]
    return [*parts, *results["notes"], _commands([results["command"]])]


def _scaling(results: Mapping[str, Any]) -> list[str]:
    head = ("varied", "value", "time", "expected", "peak memory", "runs")
    lines = [
        (
            row["axis"],
            f"{row['value']:,}",
            row["problem"] or table.seconds(row["seconds"]),
            _shown(table.seconds, row["expected_seconds"]),
            _gigabytes(row["peak_memory_bytes"]),
            str(row["runs"]),
        )
        for row in results["rows"]
    ]
    default = next(row["name"] for row in results["rows"] if row["default"])
    said = f"Captioning, one size varied at a time from {default}. {_measured(results['machine'], results['versions'])}"
    return [_markdown(head, lines, text=1), said, _commands([results["command"]])]


def _bulk(results: Mapping[str, Any]) -> list[str]:
    return [bulk.markdown(results)]


def _measured(described: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    return f"{machine.words(described, versions)}. {_built(versions)}"


def _built(versions: Mapping[str, Any]) -> str:
    return f"{versions['python']}; mplug2_fast {versions['mplug2_fast']}, commit {versions.get('commit')}."


def _commands(commands: Iterable[str]) -> str:
    """The commands, folded if there are many."""
    each = list(dict.fromkeys(commands))
    block = "```\n" + "\n".join(each) + "\n```"
    if len(each) > 4:
        return f"<details><summary>The commands that repeat the rows</summary>\n\n{block}\n</details>"
    return block


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]], text: int) -> str:
    """A table. Its first `text` columns are aligned left, the others right."""
    rule = [":---" if index < text else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _shown(form: Callable[[Any], str], value: Any) -> str:
    return table.MISSING if value is None else form(value)


def _seconds(baseline: Baseline | None) -> str:
    return table.MISSING if baseline is None else table.seconds(baseline.seconds)


def _gigabytes(value: int | None) -> str:
    return _shown(lambda v: f"{v / 1e9:.2f} GB", value)
