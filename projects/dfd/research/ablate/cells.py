"""What is compared: the cells that grids and variants make, their names, and the seeds."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.config.grammar import override, parse_override, split_override
from ...errors import UserError, first_line

# Set by the ablation itself. `train` as a whole would set both.
_RESERVED = ("train", "train.seed", "train.output_dir")
_ONLY_CELL = "all"
_MAX_SLUG = 120
# Names within --out that are no cell's.
_TAKEN = (
    *("submitit", "ablation.lock", "manifest.json"),
    *("results.csv", "results.md", "results.png", "results.html"),
)


@dataclass(frozen=True)
class Cell:
    """One setting that is compared with others, each trained with the same seeds.

    Args:
        name: as tables and ``--baseline`` call it.
        overrides: what it changes of the config, as ``key=value``.
        columns: its variant and its value of each grid key, for ``results.csv``.
    """

    name: str
    overrides: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name for a folder: of characters that neither a shell nor an override quotes."""
        text = self.name.replace(", ", "__").replace("=", "-")
        text = re.sub(r"[^A-Za-z0-9_.-]+", "-", re.sub(r"[\[\]{}()'\"]", "", text))
        text = text.lstrip("-.") or "cell"
        if len(text) > _MAX_SLUG:
            text = f"{text[:_MAX_SLUG]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"
        return text


@dataclass(frozen=True)
class _Axis:
    """One key of a grid: its values, each with what is written behind the ``=`` of an override.

    ``prefix`` is the + of a key that is new.
    """

    key: str
    prefix: str
    values: list[tuple[Any, str]]


def parse_seeds(text: str) -> list[int]:
    """``0:3`` as 0, 1, 2; ``0,3,7`` as a list; ``5`` as itself.

    Raises:
        UserError: of another form, none, negative, or one twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part, re.ASCII)
        if not found:
            raise UserError(f"--seeds {text}: it must be as 0:5, as 0,3,7 or one number from 0 on")
        first = int(found[1])
        seeds += range(first, int(found[2])) if found[2] else [first]
    if not seeds:
        raise UserError(f"--seeds {text} names no seed")
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise UserError(f"--seeds {text} names seed {twice[0]} twice")
    return seeds


def make_cells(
    *, grids: Sequence[str] = (), variants: Sequence[str] = (), overrides: Sequence[str] = ()
) -> list[Cell]:
    """Every variant (one without a name if there are none) with every combination of the grids.

    Args:
        grids: each ``KEY=[value,...]``.
        variants: each ``NAME=key=value key=value ...``.
        overrides: of every cell.

    Raises:
        UserError: one of them cannot be read, a key is given twice or is the ablation's own, or
            two cells would have one name.
    """
    axes = [_parse_grid(text) for text in grids]
    named = _parse_variants(variants)
    everywhere = "the overrides of every cell"
    shared = [(f"--grid {axis.key}", axis.key) for axis in axes]
    shared += [(everywhere, _key(text, everywhere)) for text in overrides]
    _check_keys(shared)
    for name, own in named.items():
        _check_keys(shared + [(f"--cell {name}", _key(text, f"--cell {name}")) for text in own])
    labels = _short_names([axis.key for axis in axes])
    cells = [
        _cell(name, [*overrides, *own], axes, labels, values)
        for name, own in (named or {"": []}).items()
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    _check_folders(cells)
    return cells


def find_cell(cells: Sequence[Cell], name: str | None) -> Cell:
    """The cell that ``--baseline`` names; None: the first.

    Raises:
        UserError: there is none of that name.
    """
    if name is None:
        return cells[0]
    for cell in cells:
        if cell.name == name:
            return cell
    names = "; ".join(cell.name for cell in cells)
    raise UserError(f"--baseline {name} is no cell; there are: {names}")


def _parse_grid(text: str) -> _Axis:
    where = f"--grid {text}"
    prefix, key, content = split_override(text)
    content = content.strip()
    if key is None or prefix not in ("", "+") or not (content[:1] == "[" and content[-1:] == "]"):
        raise UserError(f"{where}: it must be KEY=[value,value,...]")
    items = _items(content[1:-1])
    if not items:
        raise UserError(f"{where} has no value")
    return _Axis(key, prefix, [_read(key, item, where) for item in items])


def _items(text: str) -> list[str]:
    """The items of a list by its commas, but for those within quotes or brackets of an item."""
    items = [""]
    open_quote, depth = "", 0
    for i, character in enumerate(text):
        begins = not items[-1].strip()
        if open_quote:
            # A closing quote ends the item; one within a word is an apostrophe.
            ends = not text[i + 1 :].lstrip() or text[i + 1 :].lstrip()[0] in ",]}:"
            if character == open_quote and text[i - 1] != "\\" and ends:
                open_quote = ""
        elif character in "'\"" and (begins or depth):
            open_quote = character
        elif character in "[{" and (begins or depth):
            depth += 1
        elif character == "(" and ")" in text[i:]:
            depth += 1
        elif character in "]})" and depth:
            depth -= 1
        elif character == "," and not depth:
            items.append("")
            continue
        items[-1] += character
    items = [item.strip() for item in items]
    return [] if items == [""] else items


def _read(key: str, item: str, where: str) -> tuple[Any, str]:
    """A value of a grid and its text; what Hydra's grammar cannot read is text, such as a path."""
    if not item:
        raise UserError(f"{where}: a value is missing between its commas; empty text is ''")
    try:
        parsed = parse_override(f"{key}={item}")
        value = None if parsed.is_sweep_override() else parsed.value()
    except Exception as error:
        if item[0] in "[{":
            raise UserError(f"{where}: {item} cannot be read: close its brackets") from error
        return item, override(key, item).removeprefix(f"{key}=")
    if parsed.is_sweep_override():
        raise UserError(f"{where}: {item} is no value")
    if isinstance(value, str | list | dict):
        return value, override(key, value).removeprefix(f"{key}=")
    return value, item  # As it is: 1e3 may be the name of a folder.


def _parse_variants(texts: Sequence[str]) -> dict[str, list[str]]:
    variants: dict[str, list[str]] = {}
    for text in texts:
        name, equals, overrides = text.partition("=")
        name = name.strip()
        if not name or not equals:
            raise UserError(f"--cell {text}: it must be NAME='key=value key=value ...'")
        if name in variants:
            raise UserError(f"--cell {text}: the name {name} was given before: choose another")
        try:
            variants[name] = shlex.split(overrides)
        except ValueError as error:
            raise UserError(f"--cell {text} cannot be read: {first_line(error)}") from error
    return variants


def _key(text: str, where: str) -> str:
    key = split_override(text)[1]
    if key is None:
        raise UserError(f"{where}: {text!r} cannot be read, it must be key=value")
    return key


def _check_keys(sources: Sequence[tuple[str, str]]) -> None:
    """Refuse the keys of one cell, each with where it was given, if one would hide another."""
    seen: dict[str, str] = {}
    for where, key in sources:
        if key in _RESERVED:
            setting = "--seeds sets train.seed, and --out where the runs go"
            raise UserError(f"{where} sets {key}: {setting}; name another key")
        if key in seen:
            places = where if where == seen[key] else f"{seen[key]} and {where}"
            raise UserError(f"{key} is given twice, by {places}: only one would count")
        seen[key] = where


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """For each key its shortest dotted end that is no other key's, and is no number."""
    ends = {key: [key.split(".")[-n:] for n in range(1, key.count(".") + 2)] for key in keys}
    names = {}
    for key in keys:
        others = [end for other in keys if other != key for end in ends[other]]
        free = [end for end in ends[key] if end not in others and not end[0].isdigit()]
        names[key] = ".".join(free[0]) if free else key
    return names


def _cell(
    variant: str,
    overrides: Sequence[str],
    axes: Sequence[_Axis],
    labels: dict[str, str],
    values: Sequence[tuple[Any, str]],
) -> Cell:
    columns = {"variant": variant} if variant else {}
    parts = [variant] if variant else []
    texts = list(overrides)
    for axis, (value, text) in zip(axes, values, strict=True):
        columns[axis.key] = _label(value)
        parts.append(f"{labels[axis.key]}={_label(value)}")
        texts.append(f"{axis.prefix}{axis.key}={text}")
    # A whole part of the config before what is changed within it.
    texts.sort(key=lambda text: text.partition("=")[0].count("."))
    return Cell(", ".join(parts) or _ONLY_CELL, tuple(texts), columns)


def _label(value: Any) -> str:
    """A value in a name: a reference without its ``${}``, anything else as an override has it."""
    if isinstance(value, str):
        return re.sub(r"\$\{([^{}]*)\}", r"\1", value)
    return override("", value)[1:]


def _check_folders(cells: Sequence[Cell]) -> None:
    """Every cell needs a name and a folder of its own, also where a disk ignores case."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.slug.lower() in _TAKEN:
            raise UserError(f"the cell {cell.name} would take the place of {cell.slug}: rename it")
        other = seen.setdefault(cell.slug.lower(), cell)
        if other.name == cell.name and other is not cell:
            raise UserError(f"the cell {cell.name} is there twice: a grid has one value twice")
        if other is not cell:
            raise UserError(
                f"the cells {other.name} and {cell.name} would share the folder {cell.slug}: "
                "give them names of their own with --cell"
            )
