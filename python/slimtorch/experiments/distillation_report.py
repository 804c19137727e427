# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the distillation experiment, from the content of its results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimtorch.experiments.summary import over_seeds, spread
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = {"teacher": "67", "alone": "146", "soft 20": "74"}  # errors of 10,000: 1503.02531, section 3
PAPER_OMITTED = {"soft without 3": ("206", "109"), "soft 7 and 8 only": ("4730", "1320")}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The student over temperatures, digits it never saw, few units, and deep against shallow."""
    return [_temperatures(found), _omitted(found), _few(found), _shallow(found)]


def chosen(found: Mapping[str, Any], names: Mapping[float, str]) -> float:
    """The temperature with the fewest errors on validation images, over all seeds; of equals the lower."""
    return min(names, key=lambda value: (sum(found["rows"][names[value]]["validation"]), value))


def _temperature_names(found: Mapping[str, Any], pattern: str) -> dict[float, str]:
    return {value: pattern.format(f"{value:g}") for value in found["plan"]["temperatures"]}


def _errors(found: Mapping[str, Any], name: str, key: str = "test") -> str:
    return spread(found["rows"][name][key], digits=1)


def _fewer(found: Mapping[str, Any], name: str, base: str) -> str:
    """Errors below those of another network of the same seed."""
    rows = found["rows"]
    return spread([b - a for a, b in zip(rows[name]["test"], rows[base]["test"], strict=True)], digits=1)


def _widths(found: Mapping[str, Any], name: str) -> str:
    part = found["networks"][name]
    return f"{'-'.join(map(str, part['hidden']))} ({part['parameters']:,} parameters)"


def _seeds(found: Mapping[str, Any]) -> str:
    return f"mean ± standard deviation over {over_seeds(found['plan']['seeds'])}"


def _temperatures(found: Mapping[str, Any]) -> Table:
    names = _temperature_names(found, "soft {}")
    epochs, own = found["plan"], found["plan"]["other_temperature"]
    moved = f"soft {own:g} shifted"
    rows: list[list[object]] = [
        ["teacher", _errors(found, "teacher", "validation"), _errors(found, "teacher"), "", PAPER["teacher"]],
        ["student alone", _errors(found, "alone", "validation"), _errors(found, "alone"), "", PAPER["alone"]],
    ]
    best = chosen(found, names)
    for value, name in names.items():
        title = f"distilled, T = {value:g}{' (chosen)' if value == best else ''}"
        cells = [_errors(found, name, "validation"), _errors(found, name), _fewer(found, name, "alone")]
        rows.append([title, *cells, PAPER.get(name, "")])
    for title, name in (("alone, shifted images", "alone shifted"), (f"distilled, T = {own:g}, shifted images", moved)):
        fewer = _fewer(found, name, "alone shifted") if name != "alone shifted" else ""
        rows.append([title, _errors(found, name, "validation"), _errors(found, name), fewer, ""])
    notes = [
        f"{_seeds(found)}; fewer than alone: pairs of the same seed, shifted against shifted",
        f"teacher {_widths(found, 'teacher')}, student {_widths(found, 'student')}",
        f"errors of {found['validation']:,} validation and {found['test']:,} test images; chosen: fewest on validation",
        f"paper: errors of 10,000, teacher 1200-1200, student 800-800, 60,000 images; {found['data']}",
        "shifted images: the student's own training images too are moved by up to two pixels, as its teacher's are; "
        f"epochs: {epochs['epochs']:g}, with shifted images {epochs['jitter_epochs']:g}, teacher "
        f"{epochs['teacher_epochs']:g}",
    ]
    columns = ["network", "validation errors", "test errors", "fewer than alone", "paper"]
    return Table("A student alone and with its teacher: errors", columns, rows, notes)


def _omitted(found: Mapping[str, Any]) -> Table:
    rows: list[list[object]] = []
    for name, row in found["rows"].items():
        if "raise" not in row:
            continue
        how = "labels" if name.startswith("alone") else "soft targets"
        paper = " → ".join(PAPER_OMITTED.get(name, ()))
        rows.append([
            f"{name.split(' ', 1)[1]}, {how}", _errors(found, name),
            f"{_errors(found, name, 'omitted')} of {row['count'][0]}", spread(row["raise"], digits=2),
            _errors(found, name, "raised"), _errors(found, name, "raised_omitted"), paper,
        ])  # fmt: skip
    notes = [
        f"{_seeds(found)}; errors of {found['test']:,} test images; T = {found['plan']['other_temperature']:g}",
        "raise: of the omitted digits' biases, with the fewest errors on validation images of all digits; the paper "
        "takes the best on the test images",
        f"all digits seen: labels {_errors(found, 'alone')}, "
        f"soft targets {_errors(found, 'soft {:g}'.format(found['plan']['other_temperature']))}; paper: of 10,000",
    ]
    columns = ["transfer set", "errors", "on omitted", "raise", "then errors", "on omitted", "paper"]
    return Table("Digits that the student never sees", columns, rows, notes)


def _few(found: Mapping[str, Any]) -> Table:
    temperatures = found["plan"]["temperatures"]
    rows: list[list[object]] = []
    for count, alone, pattern in _sizes(found):
        names = _temperature_names(found, pattern)
        best = chosen(found, names)
        cells = [f"{_errors(found, names[value])}{' *' if value == best else ''}" for value in temperatures]
        rows.append([f"{count}", _errors(found, alone), *cells])
    notes = [
        f"{_seeds(found)}; units in each of two hidden layers; *: fewest errors on validation images",
        "paper: with 300 units or more all T above 8 alike, with 30 T from 2.5 to 4 better than any other",
    ]
    columns = ["units", "alone", *(f"T = {value:g}" for value in temperatures)]
    return Table(f"Few units: errors of {found['test']:,} test images", columns, rows, notes)


def _sizes(found: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """(units, name of the student alone, pattern of those with a teacher), the ordinary student last."""
    few = [(count, f"{count} units alone", f"{count} units {{}}") for count in found["plan"]["units"]]
    return [*few, (found["plan"]["student"][0], "alone", "soft {}")]


def _shallow(found: Mapping[str, Any]) -> Table:
    titles = {
        "deep": "deep, as teachers are trained",
        "deep plain": "deep, labels",
        "shallow": "shallow, labels",
        "shallow strict": "shallow, as teachers are trained",
        "mimic": "shallow, deep one's logits",
        "mimic shifted": "shallow, its logits of shifted images",
    }
    rows: list[list[object]] = [
        [title, _errors(found, name), _fewer(found, name, "shallow") if name != "shallow" else ""]
        for name, title in titles.items()
    ]
    notes = [
        f"{_seeds(found)}; fewer: pairs of the same seed; teachers: labels, dropout, max-norm, shifted images",
        f"deep {_widths(found, 'deep')}, shallow {_widths(found, 'shallow')}",
        "paper, speech frames: shallow networks that mimic reach the deep one's accuracy with as many parameters",
    ]
    columns = ["network", "test errors", "fewer than shallow, labels"]
    return Table(f"Deep against shallow: errors of {found['test']:,} test images", columns, rows, notes)


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Errors over the temperature: the student against its rivals, and students with few units."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from slimtorch.experiments.plots import COLORS, band, new_figure

    temperatures, rows = found["plan"]["temperatures"], found["rows"]

    def share(name: str) -> list[float]:
        return [100 * value / found["test"] for value in rows[name]["test"]]

    def by_seed(names: Sequence[str]) -> list[list[float]]:
        return [list(row) for row in zip(*(share(name) for name in names), strict=True)]

    def constant(axis: Any, name: str, label: str, color: str) -> None:
        band(axis, temperatures, by_seed([name] * len(temperatures)), label, color, linestyle="--")

    figure, (left, right) = new_figure(2)
    constant(left, "alone", "student alone", COLORS[4])
    names = _temperature_names(found, "soft {}").values()
    band(left, temperatures, by_seed(list(names)), "student distilled", COLORS[0], marker="o")
    constant(left, "teacher", "teacher", COLORS[6])
    left.set_title(f"{found['plan']['student'][0]} units in a layer", fontsize=10)
    left.set_ylabel("test error, %")
    for color, (count, alone, pattern) in zip(COLORS, _sizes(found), strict=False):
        base = by_seed([alone] * len(temperatures))
        own = by_seed(list(_temperature_names(found, pattern).values()))
        less = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(base, own, strict=True)]
        band(right, temperatures, less, f"{count} units", color, marker="o")
    right.axhline(0, color="black", linewidth=1)
    right.set_title("by units in a layer", fontsize=10)
    right.set_ylabel("points of test error below the student alone")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(temperatures))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("temperature")
    left.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.16))  # between the bands
    right.legend(fontsize=8, frameon=False, loc="lower left")
    caption = "Test error over the temperature, and what a teacher saves students by size. Bands: ± 1 sd over seeds."
    return [("distillation", caption, figure)]
