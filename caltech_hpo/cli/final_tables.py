"""What `final` and `report` tell people about test scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_hpo.cli.display import short_params
from caltech_hpo.cli.options import as_given

if TYPE_CHECKING:
    from caltech_hpo.results.ledger import FinalResult
    from caltech_hpo.results.report import Report
    from caltech_hpo.results.seeds import SeedsResult


def final_text(result: FinalResult, choice: str, uses: int, folder: Path) -> str:
    """The outcome of `final` for one seed, in a few lines. `uses` counts the study's test scores."""
    low, high = result.ci95
    place = as_given("--home", "--storage")
    return "\n".join(
        [
            f"study {result.study}, trial {result.trial} ({choice}): {short_params(result.params)}",
            f"{_trained(result)}, fitted on {result.fit_on}, {result.seeds} seed",
            f"test top-1 {result.test_accuracy:.4f}, 95% interval {low:.4f} to {high:.4f} "
            f"over {result.test_images:,} images; mean per class {result.test_mean_per_class_accuracy:.4f}"
            + flip_text(result)
            + leak_text(result),
            uses_text(uses),
            *([f"model, metrics and plots: {folder}"] if folder.is_dir() else []),
            f"next: caltech-hpo predict IMAGE --study {result.study}{place}; or look: caltech-hpo report "
            f"--study {result.study}{place}",
        ]
    )


def seeds_text(made: SeedsResult, choice: str, uses: int, folders: Sequence[Path]) -> str:
    """The outcome of `final --seeds N`: the mean, then each seed."""
    low, high = made.ci95
    lines = [
        f"study {made.study}, trial {made.trial} ({choice}): {short_params(made.params)}",
        f"test top-1 {made.test_accuracy:.4f}, standard deviation {made.test_accuracy_sd:.4f}, 95% interval "
        f"of the mean {low:.4f} to {high:.4f} over {made.seeds} seeds, fitted on {made.fit_on}; "
        f"mean per class {made.test_mean_per_class_accuracy:.4f}{leak_text(made.results[0])}",
    ]
    lines += [
        f"  seed {result.seed if result.seed is not None else '?'}: test top-1 {result.test_accuracy:.4f}, "
        f"{_trained(result)}{flip_text(result)}; {folder}"
        for result, folder in zip(made.results, folders, strict=True)
    ]
    return "\n".join([*lines, uses_text(uses)])


def flip_text(result: FinalResult) -> str:
    """The accuracy with test-time flip, where it was asked for."""
    flip = result.test_accuracy_flip
    return "" if flip is None else f"; with test-time flip {flip:.4f}"


def leak_text(result: FinalResult) -> str:
    """How many test images the model may have learned, where that was allowed."""
    return (
        f"; {result.leaks} of the test images are training or validation images too" if result.leaks else ""
    )


def _trained(result: FinalResult) -> str:
    validation = (
        f"validation {result.val_accuracy:.4f} at" if result.val_accuracy is not None else "trained to"
    )
    return f"{validation} epoch {result.best_epoch}"


def uses_text(uses: int) -> str:
    """How often the test set was used."""
    often = {0: "not used", 1: "used once"}.get(uses, f"used {uses} times")
    return f"the test set was {often} on this study"


def score_lines(made: Report) -> list[str]:
    """The confirmed winner of a report, its test scores, and why later ones were taken."""
    lines = []
    if made.confirmed:
        one = made.confirmed
        interval = "" if one.low is None else f" (95%: {one.low:.4f} to {one.high:.4f})"
        lines.append(
            f"confirmed: trial {one.trial}: mean validation {one.mean:.4f}{interval} over "
            f"{one.seeds} fresh {'seed' if one.seeds == 1 else 'seeds'}"
        )
    for final in made.finals:
        low, high = final.ci95
        seed = f"seed {final.seed}" if final.seed is not None else f"{final.seeds} seed"
        lines.append(
            f"test set: trial {final.trial}, fitted on {final.fit_on}: top-1 {final.test_accuracy:.4f} "
            f"({low:.4f} to {high:.4f}), mean per class {final.test_mean_per_class_accuracy:.4f}, {seed}"
            f"{leak_text(final)}"
        )
    reasons = f"; again because: {'; '.join(made.test_reasons)}" if made.test_reasons else ""
    return [*lines, uses_text(made.test_uses) + reasons]
