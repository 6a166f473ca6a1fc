"""A trained model as a file that other programs run, checked to give the same answers."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from caltech_hpo.data.cache import sync_folder
from caltech_hpo.errors import CaltechHpoError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from caltech_hpo.training.trained import TrainedModel

Format = Literal["onnx", "torch-export"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
INSTALL = "pip install 'caltech-hpo[export]'"
INPUT, OUTPUT = "images", "logits"
# Largest difference of a logit that is accepted, as a share of the largest one: fp32 sums in another order.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """The file, and the largest difference of a logit from ours over `images` test patterns."""

    file: Path
    format: Format
    images: int
    largest_difference: float
    description: dict[str, Any]


def export(trained: TrainedModel, kind: Format, file: Path) -> Exported:
    """Writes the model to `file`: temporary file, check, rename.

    Input "images": float32 (n, 3, crop, crop), RGB from 0 to 1; the normalisation is part of the model.
    Output "logits": float32 (n, classes). The classes and the preprocessing stand in the file's metadata.
    Raises UsageError where a package is missing, CaltechHpoError if the written model answers otherwise.
    """
    import torch

    from caltech_hpo.training.trained import load_model

    device = torch.device("cpu")
    described = trained.description
    model = _with_scaling(load_model(trained, device), described["preprocessing"])
    example = patterns(2, trained.recipe.crop, seed=0)
    temporary = file.with_name(f".{file.stem}.tmp{SUFFIXES[kind]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write = _write_onnx if kind == "onnx" else _write_torch
        write(model, example, described, temporary)
        worst, count = 0.0, 0
        for images in (1, 3):  # the number of images must be free
            pixels = patterns(images, trained.recipe.crop, seed=images)
            with torch.inference_mode():
                ours = model(pixels)
            theirs = (_run_onnx if kind == "onnx" else _run_torch)(temporary, pixels)
            worst, count = max(worst, _difference(ours, theirs)), count + images
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(file, kind, count, worst, described)


def patterns(count: int, crop: int, *, seed: int) -> Tensor:
    """(count, 3, crop, crop) float32 from 0 to 1: smooth random colours, as photographs have, with noise."""
    import torch

    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, size=(crop, crop), mode="bilinear")
    return (0.8 * smooth + 0.2 * torch.rand(count, 3, crop, crop, generator=draws)).contiguous()


def _with_scaling(model: nn.Module, preprocessing: dict[str, Any]) -> nn.Module:
    import torch

    class Scaled(torch.nn.Module):
        """The model behind its normalisation."""

        mean: Tensor
        std: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            for name in ("mean", "std"):
                self.register_buffer(name, torch.tensor(preprocessing[name]).view(1, 3, 1, 1))

        def forward(self, images: Tensor) -> Tensor:
            """Logits (n, classes) of images (n, 3, crop, crop) from 0 to 1."""
            logits: Tensor = self.model((images - self.mean) / self.std)
            return logits

    return Scaled().eval()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two sets of logits. Raises CaltechHpoError if it is no rounding."""
    worst = float((ours - theirs).abs().max())
    if ours.shape != theirs.shape or not worst <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise CaltechHpoError(
            f"the exported model answers otherwise: logits differ by {worst:.3g}",
            "this is a fault of the export; try the other --format",
        )
    return worst


def _write_onnx(model: nn.Module, example: Tensor, described: dict[str, Any], file: Path) -> None:
    import torch

    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs a package that is not installed: {error.name}", INSTALL
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (example,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
            dynamic_shapes=({0: torch.export.Dim("n")},),
        )  # fmt: skip
    assert program is not None
    made: onnx.ModelProto = program.model_proto
    for key, value in described.items():
        made.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(made)
    file.write_bytes(made.SerializeToString())


def _run_onnx(file: Path, pixels: Tensor) -> Tensor:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {INPUT: pixels.numpy()})
    return torch.from_numpy(logits)


def _write_torch(model: nn.Module, example: Tensor, described: dict[str, Any], file: Path) -> None:
    import torch

    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    with warnings.catch_warnings():  # torch's, of weights on other devices; these are on the CPU
        warnings.simplefilter("ignore")
        torch.export.save(program, file, extra_files={"description.json": json.dumps(described)})


def _run_torch(file: Path, pixels: Tensor) -> Tensor:
    import torch

    program: torch.export.ExportedProgram = torch.export.load(file)
    with torch.inference_mode():
        logits: Tensor = program.module()(pixels)
    return logits
