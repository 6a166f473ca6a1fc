"""Reads study files: TOML to `StudySpec`, with every error of a file reported at once."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

from caltech_hpo.errors import SpecError, UsageError
from caltech_hpo.ranges import Dimension
from caltech_hpo.spec import (
    Baseline,
    Hyperparameters,
    PrunerSpec,
    SamplerSpec,
    StudySpec,
)
from caltech_hpo.study_checks import combination_problems, model_of, recipe_table, space_of

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
SECTIONS = ("data", "folder", "recipe", "space", "sampler", "pruner", "baselines")


def study_folders() -> list[Path]:
    """The folders that hold study files; a later one wins by name."""
    package = Path(__file__).parent
    built_in = package / "studies"
    if not built_in.is_dir():  # a source checkout keeps them beside the package
        built_in = package.parent / "studies"
    return [built_in, Path("studies")]


def study_files() -> dict[str, Path]:
    """Study name to file, built-in ones first, `./studies` over them; sorted by name."""
    found = {path.stem: path for folder in study_folders() for path in folder.glob("[!.]*.toml")}
    return dict(sorted(found.items()))


def base_name(study_name: str) -> str:
    """The name of the study file behind a stored study: "alexnet-scratch@2" -> "alexnet-scratch"."""
    return study_name.split("@", 1)[0]


def load_study(name: str) -> StudySpec:
    """Reads the study file behind `name` ("NAME" or "NAME@2").

    Raises UsageError for an unknown name (suggesting the nearest), SpecError for a faulty file.
    """
    if not STUDY_NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no study name",
            "use letters, digits, '.', '_', '@' and '-', at most 100, beginning with a letter or digit",
        )
    if name.endswith("@"):
        raise UsageError(f"'{name}' says nothing behind '@'", f"write '{name}2' for a second '{name[:-1]}'")
    files = study_files()
    path = files.get(name) or files.get(base_name(name))
    if path is None:
        near = difflib.get_close_matches(base_name(name), files, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"there is no study '{name}'", f"{hint}'caltech-hpo studies' lists them; yours go into ./studies"
        )
    return read_study(path)


def read_study(path: Path) -> StudySpec:
    """Parses one study file. Raises SpecError naming the file and every faulty key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SpecError(f"{path}: not valid TOML: {error}", "mend that line; see https://toml.io") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}", "check the file and its permissions") from error
    return parse_study(document, name=path.stem, about=leading_comment(text), source=str(path))


def leading_comment(text: str) -> str:
    """The `#` lines at the top of a study file, without the marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


def parse_study(document: dict[str, Any], *, name: str, about: str = "", source: str = "study") -> StudySpec:
    """Checks a parsed TOML document and builds the StudySpec.

    Raises SpecError listing every error with its key, in the order of the file's sections.
    """
    problems: list[str] = [
        f"{key}: unknown section (known: {', '.join(SECTIONS)})" for key in document if key not in SECTIONS
    ]
    data = document.get("data", "caltech101")
    if data not in ("caltech101", "demo", "folder"):
        problems.append(f"data: {data!r} is not one of caltech101, demo, folder")
    folder = document.get("folder", "")
    if not isinstance(folder, str) or (folder and data != "folder"):
        problems.append('folder: is the path of the images of data = "folder"')
    recipe = model_of(Hyperparameters, recipe_table(document.get("recipe")), "recipe", problems)
    space = space_of(document.get("space", {}), problems)
    sampler = model_of(SamplerSpec, document.get("sampler", {}), "sampler", problems)
    pruner = model_of(PrunerSpec, document.get("pruner", {}), "pruner", problems)
    if not document.get("space"):
        problems.append("space: nothing to search; name at least one field with a range or choices")
    faulty = set(document["space"]) - set(space) if isinstance(document.get("space"), dict) else set()
    baselines = _baselines(document.get("baselines", []), space, faulty, recipe, problems)
    if recipe is not None and not problems:
        problems.extend(combination_problems(recipe, space))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise SpecError(f"{source}: {len(problems)} error(s):\n{lines}", "mend these keys in the file")
    assert recipe and sampler and pruner  # each is None only with a problem
    return StudySpec(
        name=name, about=about, data=data, folder=folder, recipe=recipe, space=space, sampler=sampler,
        pruner=pruner, baselines=tuple(baselines),
    )  # fmt: skip


def _baselines(
    rows: Any, space: dict[str, Dimension], faulty: set[str], recipe: Hyperparameters | None,
    problems: list[str],
) -> list[Baseline]:  # fmt: skip
    if not isinstance(rows, list):
        problems.append("baselines: write each row as [[baselines]]")
        return []
    baselines = []
    for number, row in enumerate(rows):
        key = f"baselines[{number}]"
        baseline = model_of(Baseline, row, key, problems)
        if baseline is None:
            continue
        # a dimension with an error of its own is no reason to complain of the rows that use it
        params = {name: value for name, value in baseline.params.items() if name not in faulty}
        found = params_problems(params, space, f"{key}.params")
        if recipe is not None and not found:
            defaults = recipe.model_dump()
            found = [
                f"{key}.params.{name}: not given, and recipe.{name} = {defaults[name]!r} is outside the space"
                for name, dimension in space.items()
                if name not in baseline.params and not dimension.contains(defaults[name])
            ]
        problems.extend(found)
        baselines.append(baseline)
    names = [baseline.name for baseline in baselines]
    problems.extend(
        f"baselines: the name '{n}' is used twice" for n in sorted({n for n in names if names.count(n) > 1})
    )
    return baselines


def params_problems(params: dict[str, Any], space: dict[str, Dimension], key: str) -> list[str]:
    """What keeps `params` from being a point of the space: unknown names, values outside it."""
    problems = []
    for name, value in params.items():
        if name not in space:
            problems.append(f"{key}.{name}: not in [space] ({', '.join(space) or 'which is empty'})")
        elif not space[name].contains(value):
            problems.append(f"{key}.{name}: {value!r} lies outside space.{name}")
    return problems


def complete_params(spec: StudySpec, params: dict[str, Any]) -> dict[str, Any]:
    """`params` with what they leave out taken from `[recipe]`, in the order of the space."""
    defaults = spec.recipe.model_dump()
    return {name: params.get(name, defaults[name]) for name in spec.space}
