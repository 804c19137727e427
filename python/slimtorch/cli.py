# SPDX-License-Identifier: Apache-2.0
"""The command ``slimtorch``. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console

    from slimtorch.report import Table

app = typer.Typer(
    help="Smaller networks that are really faster: prune, pack, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[Path | None, typer.Option("--json", help="Also write all results to this file, as JSON.")]


@app.callback()
def main() -> None:
    """Smaller networks that are really faster: prune, pack, measure."""


def _fail(message: str) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(f"slimtorch: {message}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a user can mend, as one line and exit code 2; an interrupt says how to go on."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        text = str(error) or type(error).__name__
        if not isinstance(error, OSError) or error.strerror is None:
            _fail(" ".join(text.split()))
        _fail(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, the processor's features, the kernels chosen for it, and GPUs."""
    with _plain_errors():
        facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    from slimtorch.report import Table

    features = [name for name, present in facts["cpu_features"].items() if present]
    rows: list[list[object]] = [
        ["slimtorch", facts["slimtorch"]],
        ["torch", facts["torch"]],
        ["python", facts["python"]],
        ["CPU", f"{facts['cpu']}, {facts['cores']} cores available, {facts['threads']} torch threads"],
        ["CPU features", " ".join(features) or "none of those that the kernels use"],
        ["CPU kernels", f"{facts['isa']} (SLIMTORCH_CPU=scalar|avx2|avx512 forces one)"],
        ["CUDA built for", " ".join(facts["cuda_archs"]) or "nothing: built without CUDA kernels"],
        ["CUDA devices", ", ".join(facts["cuda_devices"]) or "none seen by torch"],
    ]
    Console().print(Table("slimtorch", ["", ""], rows))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .slim file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a .slim file, layer by layer, and check its checksums."""
    with _plain_errors():
        from slimtorch import storage

        report = storage.inspect(file)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


def _facts() -> dict[str, Any]:
    import platform

    import torch

    from slimtorch import _C
    from slimtorch.experiments import machine

    return {
        "slimtorch": _C.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "cpu_features": dict(_C.cpu_features()),
        "isa": _C.isa(),
        "cuda_archs": list(_C.cuda_archs()),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


@app.command()
def compare(
    network: Annotated[
        str,
        typer.Option(
            help="digits: LeNet-300-100 and LeNet-5 trained on real digits. lenet300, lenet5: one of them. alexnet: "
            "layers of AlexNet on published pruned weights. vgg16, resnet50: layer shapes with random masks."
        ),
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the report; an interrupted run goes on from here.")] = Path(
        "slimtorch-compare"
    ),
    json_file: Json = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under 40 seconds: one seed, two sparsities, less training.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Training seeds (digits) [default: 3]", min=1)] = None,
    jobs: Annotated[int | None, typer.Option(help="Training processes (digits) [default: one per core]", min=1)] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="alexnet: folder with alexnet_l1.npz and alexnet_ssl.npz, or one of the two "
            "[default: ../shared/data, or random masks]"
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per call (layer networks) [default: 1]", min=1)] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch while timing.", min=1)] = 1,
) -> None:
    """Compare ways to prune: accuracy, size and measured speed, against the best dense code.

    Prints tables, and writes report.html, results.json and the plots into the folder given by --out. Training keeps
    every finished network there: run the same command again after an interrupt.
    """
    layered = network in ("alexnet", "vgg16", "resnet50")
    if not layered and network not in ("digits", "lenet300", "lenet5"):
        _fail(f"--network: expected digits, lenet300, lenet5, alexnet, vgg16 or resnet50, got {network!r}")
    for name, value, fits in (
        ("--seeds", seeds, not layered),
        ("--jobs", jobs, not layered),
        ("--batch", batch, layered),
        ("--weights", weights, network == "alexnet"),
    ):
        if value is not None and not fits:
            _fail(f"{name}: does not apply to --network {network}")
    try:
        with _plain_errors():
            if layered:
                _compare_layers(network, out, json_file, quick, weights, batch or 1, threads)
            else:
                _compare_digits(network, out, json_file, quick, seeds, jobs, threads)
    except KeyboardInterrupt:
        typer.echo("interrupted: what is finished is kept, the same command goes on from there", err=True)
        raise typer.Exit(130) from None


def _compare_digits(
    network: str, out: Path, json_file: Path | None, quick: bool, seeds: int | None, jobs: int | None, threads: int
) -> None:
    from dataclasses import replace

    from slimtorch.experiments import compare as comparing
    from slimtorch.experiments import plots

    settings = replace(comparing.quick() if quick else comparing.Settings(), threads=threads)
    if network != "digits":
        settings = replace(settings, networks=(network,))
    if seeds is not None:
        settings = replace(settings, seeds=seeds)
    console, progress = _console()
    with progress as show:
        result = comparing.run(settings, out, jobs=jobs, progress=show)
        show("report", 0, 1)
        figures = plots.comparison_figures(result)
        lead = (
            "Small networks trained on 5,000 real handwritten digits, pruned in several ways, packed into sparse "
            "kernels and timed beside the best dense code on the same machine, in one process and by turns. Accuracy "
            "is that of held-out test images, at small scale."
        )
        title = "Pruned networks, measured"
        lists = [("Where it does not win", result.losses())]
        _save(out, json_file, title, lead, result.tables(), figures, lists, result.to_dict())
        show("report", 1, 1)
    _print(console, result.tables(), out, json_file)


def _compare_layers(
    network: str, out: Path, json_file: Path | None, quick: bool, weights: Path | None, batch: int, threads: int
) -> None:
    from slimtorch.experiments import layers, plots

    console, progress = _console()
    with progress as show:
        if network == "alexnet":
            samples = 7 if quick else 21
            result = layers.compare_alexnet(weights, batch=batch, samples=samples, threads=threads, progress=show)
        else:
            samples = 3 if quick else 7
            result = layers.compare_shapes(network, batch=batch, samples=samples, threads=threads, progress=show)
        show("report", 0, 1)
        drawn = plots.layer_speedups(result)
        figures = [(f"{network}-{kind.replace(' ', '-')}", f"{result.title}: {kind}", figure) for kind, figure in drawn]
        lead = "Every layer timed beside the best dense code on the same machine, in one process and by turns."
        _save(out, json_file, result.title, lead, result.tables(), figures, [], result.to_dict())
        show("report", 1, 1)
    _print(console, result.tables(), out, json_file)


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(help="Which experiment; without it, the list of them.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; an interrupted run goes on from here [default: slimtorch-NAME]"),
    ] = None,
    json_file: Json = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: fewer seeds, less training.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Training seeds [default: the experiment's own]", min=1)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="mnist|cifar10|FOLDER",
            help="A full data set: downloaded by torchvision, or a folder that holds MNIST's or CIFAR-10's files "
            "[default: 5,000 real digits that need no download]",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch while timing.", min=1)] = 1,
    jobs: Annotated[int | None, typer.Option(help="Training processes [default: one per core]", min=1)] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Train on a Ray cluster: its address, auto for the one this machine is in, local for one of its own.",
        ),
    ] = None,
) -> None:
    """Repeat what a paper claims, at small scale on real data, and measure what it left out.

    Prints tables, and writes report.html, results.json and the plots into the folder given by --out. Training keeps
    every finished network there: run the same command again after an interrupt.
    """
    from slimtorch.experiments import catalogue

    if name is None:
        for known, (_, about) in catalogue.EXPERIMENTS.items():
            typer.echo(f"{known:<20}{about}")
        return
    try:
        with _plain_errors():
            chosen = catalogue.find(name)
            settings = catalogue.Settings(quick, seeds, data, threads, jobs, ray)
            folder = out or Path(f"slimtorch-{name}")
            console, progress = _console()
            config = dict(chosen.config(settings))
            _print_config(console, name, chosen.paper, config)
            with progress as show:
                result = chosen.run(settings, folder, show)
                show("report", 0, 1)
                found = {**result.data, "config": config}
                _save(folder, json_file, result.title, result.lead, result.tables, result.figures, [], found)
                show("report", 1, 1)
            _print(console, result.tables, folder, json_file)
    except KeyboardInterrupt:
        typer.echo("interrupted: what is finished is kept, the same command goes on from there", err=True)
        raise typer.Exit(130) from None


@app.command()
def compress(
    recipe: Annotated[Path, typer.Option("--recipe", help="The recipe, a YAML file: model, data, phases.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for networks and report; an interrupted run goes on there [default: slimtorch-FILE]"),
    ] = None,
    json_file: Json = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="digits|mnist|cifar10|FOLDER|MODULE:FUNCTION", help="In place of the recipe's data."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="In place of the recipe's threads of torch.", min=1)] = None,
    every: Annotated[
        float, typer.Option(help="Seconds between two kept states of a training phase.", min=0.0)
    ] = 30.0,
) -> None:
    """Train, prune, distil, cluster, pack … a network as a recipe says, and measure it after each phase.

    The model is named in the recipe as package.module:function, found from the current folder too. Each phase's network
    is kept in the folder given by --out, and a phase of training keeps its progress: run the same command again after
    an interrupt. Writes report.html, results.json and model.slim there.
    """
    import sys
    from dataclasses import replace

    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with _plain_errors():
            from slimtorch import storage
            from slimtorch.recipe.reading import read
            from slimtorch.recipe.report import LEAD, TITLE
            from slimtorch.recipe.run import PhaseError

            reading = read(recipe)
            chosen = reading.recipe if threads is None else replace(reading.recipe, threads=threads)
            folder = out or Path(f"slimtorch-{recipe.stem}")
            console, progress = _console()
            with progress as show:
                try:
                    result = chosen.run(data=data, folder=folder / "networks", every=every, show=show)
                except PhaseError as error:
                    raise reading.error(error) from error
                tables = result.report.tables()
                try:
                    storage.save(result.model, folder / "model.slim")
                except ValueError as error:
                    (folder / "model.slim").unlink(missing_ok=True)
                    tables[0].notes.append(f"no model.slim: {error}")
                try:
                    figures = result.report.figures()
                except ImportError as error:  # what was done is worth more than its picture
                    figures = []
                    tables[-1].notes.append(str(error))
                _save(folder, json_file, TITLE, LEAD, tables, figures, [], result.report.to_dict())
            _print(console, tables, folder, json_file)
    except KeyboardInterrupt:
        typer.echo("interrupted: what is finished is kept, the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    finally:
        sys.path.remove(here)


def _print_config(console: Console, name: str, paper: str, config: Mapping[str, Any]) -> None:
    """What will be done, a line for each setting; a long one goes on below its own beginning."""
    from rich.padding import Padding
    from rich.table import Table as Grid

    grid = Grid.grid(padding=(0, 2))
    for key, value in config.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        grid.add_row(key, text)
    console.print(f"{name} ({paper})", highlight=False)
    console.print(Padding(grid, (0, 0, 1, 2)), highlight=False, markup=False)


def _console() -> tuple[Console, Any]:
    """A console for the tables, and a context manager that gives ``show(stage, done, total)``: one bar per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    bars = Progress(
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )

    @contextmanager
    def progress() -> Iterator[Callable[[str, int, int], None]]:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        with bars:
            yield show

    return console, progress()


def _save(
    out: Path,
    json_file: Path | None,
    title: str,
    lead: str,
    tables: Sequence[Table],
    figures: Sequence[tuple[str, str, Any]],
    lists: Sequence[tuple[str, Sequence[str]]],
    results: dict[str, Any],
) -> None:
    from slimtorch._files import write_atomically
    from slimtorch.experiments import html, plots

    out.mkdir(parents=True, exist_ok=True)
    for name, _, figure in figures:
        plots.save_png(figure, out / f"{name}.png")
    drawings = [(caption, plots.svg(figure)) for _, caption, figure in figures]
    html.save(html.page(title, lead, tables, drawings, lists), out / "report.html")
    text = json.dumps(results, indent=1)
    for path in {out / "results.json", json_file or out / "results.json"}:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _print(console: Console, tables: Sequence[Table], out: Path, json_file: Path | None) -> None:
    for table in tables:
        typer.echo(str(table) + "\n")
    written = [out / "report.html", json_file or out / "results.json"]
    console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True, highlight=False)
