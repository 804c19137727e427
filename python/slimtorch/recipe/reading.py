# SPDX-License-Identifier: Apache-2.0
"""A recipe as one YAML file.

    model: slimtorch.models:LeNet300        # package.module:function; or {function: …, and its arguments}
    data: digits                            # or mnist, cifar10, a folder, package.module:function
    seed: 0
    measure: {batches: [1, 64], threads: 1}
    phases:
      - train: {epochs: 5, rate: 2e-3}
      - prune: {sparsity: 0.9, scope: global}
      - distill: {epochs: 3, temperature: 4}
      - cluster: {layers: {"fc*": {bits: 4}}}
      - pack

A phase is one key, which is its kind, and its settings; a configuration for some layers only stands under ``layers``,
by glob of their names. Every mistake is told with file, line and key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slimtorch import design, distill, prune, quantize
from slimtorch.recipe import phases
from slimtorch.recipe.phases import Phase, closest
from slimtorch.recipe.run import PhaseError, Recipe

METHODS: dict[str, dict[str, Any]] = {
    "prune": {"magnitude": prune.Magnitude, "neurons": prune.Neurons},
    "separate": {"separable": design.Separable},
    "cluster": {"kmeans": quantize.KMeans, "uniform": quantize.Uniform},
    "binarize": {
        "binary_connect": quantize.BinaryConnect, "binary_net": quantize.BinaryNet,
        "binary_weight": quantize.BinaryWeight, "xnor_net": quantize.XnorNet,
    },
}  # fmt: skip
"""Kind of phase -> names of its configurations, under the key ``method``; the first where that key is missing."""

TERMS = {
    "soft_targets": distill.SoftTargets, "logit_regression": distill.LogitRegression, "decoupled": distill.Decoupled,
    "dist": distill.Dist, "hint": distill.Hint, "attention": distill.Attention, "similarity": distill.Similarity,
    "relation": distill.Relation, "contrastive": distill.Contrastive,
}  # fmt: skip


class RecipeError(ValueError):
    """A mistake in a recipe's file: ``path``, ``line`` (from 1) and ``key`` say where."""

    def __init__(self, path: str, line: int, key: str, text: str) -> None:
        super().__init__(f"{path}, line {line}: {key}: {text}" if key else f"{path}, line {line}: {text}")
        self.path, self.line, self.key = path, line, key


@dataclass(frozen=True)
class Reading:
    """A recipe and where in the file each phase begins."""

    recipe: Recipe
    path: str
    lines: tuple[int, ...]

    def error(self, error: PhaseError) -> RecipeError:
        """An error of a phase, with its place in the file."""
        index = min(max(error.phase, 1), len(self.lines)) - 1
        return RecipeError(self.path, self.lines[index], f"phases[{index}]", str(error))


def read(path: Path) -> Reading:
    """A recipe from a file.

    Raises:
        RecipeError: with file, line and key.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), 1, "", f"expected a text in UTF-8 ({error.reason})") from error
    return parse(text, str(path))


def parse(text: str, name: str = "recipe") -> Reading:
    """A recipe from a text; ``name`` stands for the file in errors."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(name, mark.line + 1 if mark else 1, "", f"no valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(name, 1, "", f"no valid YAML: {error}") from error
    if root is None:
        raise RecipeError(name, 1, "", "expected a recipe, got an empty file")
    return _Reader(name).recipe(root)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 2e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Reader:
    """Walks the nodes of one file, so that each value knows its line."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._loader = _Loader("")

    def fail(self, node: yaml.Node, key: str, text: str) -> RecipeError:
        return RecipeError(self.path, node.start_mark.line + 1, key, text)

    def recipe(self, root: yaml.Node) -> Reading:
        top = self.mapping(root, "", ("model", "data", "seed", "measure", "phases"))
        if "phases" not in top:
            raise self.fail(root, "phases", "expected a list of phases, got none")
        node = top["phases"]
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(node, "phases", "expected a list of at least one phase")
        made = [self.phase(item, f"phases[{index}]") for index, item in enumerate(node.value)]
        lines = tuple(item.start_mark.line + 1 for item in node.value)
        arguments: dict[str, Any] = {}
        if "measure" in top:
            measure = self.mapping(top["measure"], "measure", ("batches", "threads"))
            arguments = {key: self.plain(value, f"measure.{key}") for key, value in measure.items()}
            if not isinstance(arguments.get("batches", []), list):
                raise self.fail(measure["batches"], "measure.batches", f"expected a list, got {arguments['batches']!r}")
        for key in ("model", "data", "seed"):
            if key in top:
                arguments[key] = self.plain(top[key], key)
        if not isinstance(arguments.get("model", ""), (str, dict)):
            raise self.fail(top["model"], "model", f"expected package.module:function, got {arguments['model']!r}")
        if not isinstance(arguments.get("data", ""), str):
            raise self.fail(top["data"], "data", f"expected a name, got {arguments['data']!r}")
        try:
            return Reading(Recipe(made, **arguments), self.path, lines)
        except PhaseError as error:
            at = node.value[min(max(error.phase, 1), len(made)) - 1]
            raise self.fail(at, f"phases[{error.phase - 1}]", str(error)) from error
        except (ValueError, TypeError) as error:
            word = str(error).partition(":")[0]
            place = {"batches": "measure", "threads": "measure"}.get(word, word)
            raise self.fail(top.get(place, root), "", str(error)) from error

    # --- phases ---

    def phase(self, node: yaml.Node, where: str) -> Phase:
        """``kind: {settings}``, or ``kind`` alone."""
        if isinstance(node, yaml.ScalarNode):
            kind, settings, at = str(self.plain(node, where)), {}, node
        else:
            held = self.mapping(node, where, KINDS, "a phase")
            if len(held) != 1:
                raise self.fail(node, where, f"expected one kind of phase, got {len(held)}: {', '.join(held)}")
            kind, at = next(iter(held.items()))
            empty = isinstance(at, yaml.ScalarNode) and self.plain(at, where) is None
            settings = {} if empty else self.mapping(at, f"{where}.{kind}", None)
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise self.fail(node, where, f"unknown phase {kind!r}{closest(kind, list(KINDS))}; known: {known}")
        return KINDS[kind](self, kind, at, settings, f"{where}.{kind}")

    def settings(self, cls: type[Any], at: yaml.Node, nodes: Mapping[str, yaml.Node], where: str, **more: Any) -> Any:
        """``cls`` from keys that are its fields; what it does not accept is told with the line of the key."""
        fields = [f for f in dataclasses.fields(cls) if f.init]
        known = [f.name for f in fields if f.name not in more]
        for key, node in nodes.items():
            if key not in known:
                raise self.fail(node, f"{where}.{key}", f"unknown key{closest(key, known)}; known: {', '.join(known)}")
        for f in fields:
            needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if needed and f.name not in nodes and f.name not in more:
                raise self.fail(at, where, f"expected the key {f.name!r}")
        values = {key: self.plain(node, f"{where}.{key}") for key, node in nodes.items()}
        if isinstance(values.get("loss_fn"), str):
            values["loss_fn"] = self.function(nodes["loss_fn"], f"{where}.loss_fn", values["loss_fn"])
        try:
            return cls(**values, **more)
        except (ValueError, TypeError) as error:
            word, _, rest = str(error).partition(":")
            word = word.rpartition(".")[2]
            if word in nodes:
                raise self.fail(nodes[word], f"{where}.{word}", rest.strip()) from error
            raise self.fail(at, where, str(error)) from error

    def function(self, node: yaml.Node, where: str, spec: str) -> Callable[..., Any]:
        try:
            return phases.find(spec, where.rpartition(".")[2])
        except (ValueError, ImportError) as error:
            raise self.fail(node, where, str(error)) from error

    def config(self, kind: str, at: yaml.Node, nodes: Mapping[str, yaml.Node], where: str) -> Any:
        """One configuration, or under ``layers`` one for each glob."""
        nodes = dict(nodes)
        layers = nodes.pop("layers", None)
        if layers is None:
            return self.method(kind, at, nodes, where)
        if nodes:
            key, node = next(iter(nodes.items()))
            raise self.fail(node, f"{where}.{key}", "expected no other key beside 'layers'; give it to each glob")
        found: dict[str, Any] = {}
        for glob, node in self.mapping(layers, f"{where}.layers", None).items():
            place = f"{where}.layers.{glob}"
            if isinstance(node, yaml.ScalarNode) and self.plain(node, place) is None:
                found[glob] = None
            else:
                found[glob] = self.method(kind, node, self.mapping(node, place, None), place)
        if not found:
            raise self.fail(layers, f"{where}.layers", "expected at least one glob, got none")
        return found

    def method(self, kind: str, at: yaml.Node, nodes: Mapping[str, yaml.Node], where: str) -> Any:
        known, nodes = METHODS[kind], dict(nodes)
        chosen = next(iter(known))
        if "method" in nodes:
            node = nodes.pop("method")
            chosen = str(self.plain(node, f"{where}.method"))
            if chosen not in known:
                names = ", ".join(known)
                raise self.fail(
                    node, f"{where}.method", f"expected one of {names}, got {chosen!r}{closest(chosen, list(known))}"
                )
        return self.settings(known[chosen], at, nodes, where)

    # --- values ---

    def mapping(
        self, node: yaml.Node, where: str, known: Iterable[str] | None, what: str = "a mapping"
    ) -> dict[str, yaml.Node]:
        """Key -> node; a key that is not ``known``, or there twice, is a mistake."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, where, f"expected {what} (key: value), got {self.plain(node, where)!r}")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.plain(key_node, where)
            if not isinstance(key, str):
                raise self.fail(key_node, where, f"expected a text as key, got {key!r}")
            place = f"{where}.{key}" if where else key
            if known is not None and key not in known:
                names = list(known)
                hint = closest(key, names)
                raise self.fail(key_node, place, f"unknown key{hint}; known: {', '.join(names)}")
            if key in found:
                raise self.fail(key_node, place, "the key is there twice")
            found[key] = value
        return found

    def plain(self, node: yaml.Node, where: str, above: tuple[int, ...] = ()) -> Any:
        """The value of a node in Python's words."""
        if id(node) in above:
            raise self.fail(node, where, "refers to itself")
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return {self.plain(k, where, above): self.plain(v, where, above) for k, v in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, where, above) for item in node.value]
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            text = getattr(error, "problem", None) or str(error)
            raise self.fail(node, where, f"no plain value: {text}") from error


# --- kinds of phases --------------------------------------------------------------------------------------------------

Nodes = Mapping[str, yaml.Node]
Make = Callable[[_Reader, str, yaml.Node, Nodes, str], Phase]


def _of(cls: type[Phase]) -> Make:
    """A phase whose keys are its fields."""

    def make(reader: _Reader, kind: str, at: yaml.Node, nodes: Nodes, where: str) -> Phase:
        made = reader.settings(cls, at, nodes, where)
        assert isinstance(made, Phase)
        return made

    return make


def _configured(cls: type[Phase]) -> Make:
    """A phase with a configuration, whose keys stand beside the phase's own."""
    own = [f.name for f in dataclasses.fields(cls) if f.name != "config"]

    def make(reader: _Reader, kind: str, at: yaml.Node, nodes: Nodes, where: str) -> Phase:
        rest = {key: node for key, node in nodes.items() if key not in own}
        mine = {key: node for key, node in nodes.items() if key in own}
        made = reader.settings(cls, at, mine, where, config=reader.config(kind, at, rest, where))
        assert isinstance(made, Phase)
        return made

    return make


def _distill(reader: _Reader, kind: str, at: yaml.Node, nodes: Nodes, where: str) -> Phase:
    """``temperature`` and ``weight`` for soft targets alone, or ``terms``, a list of ``name: {settings}``."""
    rest, terms = dict(nodes), []
    short: dict[str, yaml.Node] = {key: rest.pop(key) for key in ("temperature", "weight") if key in rest}
    node = rest.pop("terms", None)
    if node is None:
        defaults = {} if "weight" in short else {"weight": 0.9}
        terms.append(reader.settings(distill.SoftTargets, at, {**short}, where, **defaults))
    elif short:
        key = next(iter(short))
        raise reader.fail(short[key], f"{where}.{key}", "expected no such key beside 'terms'; give it to a term")
    elif not isinstance(node, yaml.SequenceNode):
        raise reader.fail(node, f"{where}.terms", "expected a list of terms")
    else:
        for index, item in enumerate(node.value):
            place = f"{where}.terms[{index}]"
            held = reader.mapping(item, place, TERMS, "a term")
            if len(held) != 1:
                raise reader.fail(item, place, f"expected one term, got {len(held)}")
            name, settings = next(iter(held.items()))
            place = f"{place}.{name}"
            terms.append(reader.settings(TERMS[name], settings, reader.mapping(settings, place, None), place))
    made = reader.settings(phases.Distill, at, rest, where, terms=tuple(terms))
    assert isinstance(made, Phase)
    return made


KINDS: dict[str, Make] = {
    "train": _of(phases.Train), "distill": _distill, "prune": _configured(phases.Prune),
    "cluster": _configured(phases.Cluster), "binarize": _configured(phases.Binarize), "pack": _of(phases.Pack),
    "separate": _configured(phases.Separate), "early_exit": _of(phases.Exits), "calibrate": _of(phases.Calibrate),
    "apply": _of(phases.Apply),
}  # fmt: skip
