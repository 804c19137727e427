# SPDX-License-Identifier: Apache-2.0
"""What a recipe came to: accuracy, size, multiply-accumulates and latency after each phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from slimtorch.measure import Latency
from slimtorch.report import Table, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class PhaseReport:
    """The network after one phase.

    Attributes:
        name: of the phase; "0-start" is the network as it was given.
        kind: "start", "train", "prune" …
        seconds: that the phase took, where it was not interrupted.
        validation, test: shares of the images that are classified right, in [0, 1].
        parameters: values stored: of clustered layers, those of the tables.
        nonzero: weights and biases that are not zero, in whatever format.
        bytes_file: of the ``.slim`` file; None for a network that cannot be stored as one.
        bytes_memory: of parameters, buffers and index arrays, masks baked.
        macs: multiply-accumulates for one image, the mean over a batch.
        latency: by batch size; seconds of a call. Batch 1 is the mean over many single images.
        note: one line of the phase.
    """

    name: str
    kind: str
    seconds: float
    validation: float
    test: float
    parameters: int
    nonzero: int
    bytes_file: int | None
    bytes_memory: int
    macs: float
    note: str = ""
    latency: dict[int, Latency] = field(default_factory=dict)


@dataclass
class RecipeReport:
    """The answer of :meth:`slimtorch.Recipe.run`; prints as two tables.

    Attributes:
        phases: the network as it was given, then after each phase.
        data: what it was trained on, in words.
        threads: of torch, while latencies were measured.
    """

    phases: list[PhaseReport]
    data: str
    threads: int

    @property
    def reference(self) -> PhaseReport:
        """What the others are compared with: the network before the first phase that does not only train."""
        start = self.phases[0]
        for phase in self.phases[1:]:
            if phase.kind not in ("train", "distill"):
                break
            start = phase
        return start

    def tables(self) -> list[Table]:
        """Accuracy and size, and latency where it was measured."""
        base = self.reference
        rows: list[list[object]] = [
            [
                p.name, f"{100 * p.validation:.2f}", f"{100 * p.test:.2f}", p.nonzero,
                None if p.bytes_file is None else format_bytes(p.bytes_file), round(p.macs), f"{p.seconds:.1f}",
            ]
            for p in self.phases
        ]  # fmt: skip
        columns = ["after", "validation, %", "test, %", "nonzero", "file", "MACs per image", "seconds"]
        notes = [f"{p.name}: {p.note}" for p in self.phases if p.note]
        last = self.phases[-1]
        if base.bytes_file and last.bytes_file:
            notes.append(f"file of {last.name}: {base.bytes_file / last.bytes_file:.1f} times smaller than {base.name}")
        tables = [Table("After each phase", columns, rows, [*notes, self.data])]
        batches = list(base.latency)
        if batches:
            columns = ["after", *(text for b in batches for text in (f"batch {b}", "p10 - p90", "speed-up"))]
            rows = [[p.name, *(cell for b in batches for cell in _cells(p, base, b))] for p in self.phases]
            threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
            notes = [
                f"medians, all networks by turns, {threads}, on held-out images; speed-up over {base.name}, which "
                "torch runs as it is; masks are baked"
            ]
            tables.append(Table("Measured latency", columns, rows, notes))
        return tables

    def figures(self) -> list[tuple[str, str, Figure]]:
        """(file name, caption, figure): accuracy, size and latency, from the network that is compared with on.

        Raises:
            ImportError: matplotlib is not there; the message names the extra.
        """
        from slimtorch.experiments.plots import phase_by_phase

        base = self.reference
        shown = self.phases[self.phases.index(base) :]
        latency = {
            batch: [phase.latency[batch].median / own.median for phase in shown] for batch, own in base.latency.items()
        }
        drawn = phase_by_phase(
            [phase.name for phase in shown], [[phase.test for phase in shown]], [phase.bytes_file for phase in shown],
            latency, base.name,
        )  # fmt: skip
        return [("phases", f"Phase by phase, from {base.name} on.", drawn)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "reference": self.reference.name}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> RecipeReport:
        """From what `to_dict` gave, also by way of JSON."""
        phases = [phase_of(phase) for phase in found["phases"]]
        return cls(phases, found["data"], found["threads"])

    def to_html(self) -> str:
        """One page that needs no other file; with a plot where matplotlib is there."""
        from slimtorch.experiments import html, plots

        try:
            drawings = [(caption, plots.svg(figure)) for _, caption, figure in self.figures()]
        except ImportError:
            drawings = []
        return html.page(TITLE, LEAD, self.tables(), drawings, [])

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables())


TITLE = "A network made smaller, phase by phase"
LEAD = "Accuracy on held-out images, size of the file, multiply-accumulates and measured latency after each phase."


def phase_of(found: Mapping[str, Any]) -> PhaseReport:
    """From the dict of one."""
    latency = {int(batch): Latency(**dict(value)) for batch, value in found["latency"].items()}
    return PhaseReport(**{**found, "latency": latency})


def _cells(phase: PhaseReport, base: PhaseReport, batch: int) -> list[object]:
    time = phase.latency.get(batch)
    if time is None:
        return [None, None, None]
    spread = f"{format_seconds(time.p10)} - {format_seconds(time.p90)}"
    return [format_seconds(time.median), spread, f"{base.latency[batch].median / time.median:.2f}x"]
