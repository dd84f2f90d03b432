"""What options of the Runner do to the terms of a distiller: refusals that training and ``kd-mm check`` share."""

import warnings
from typing import Any, List, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.semi import is_semi
from kd_mm.ops.problems import Problems

#: Class of a data preprocessor -> what is not supported, and the mend.
UNFIT = dict(
    Det3DDataPreprocessor='models of point clouds (Det3DDataPreprocessor of MMDet3D) are not supported: their batches '
                          'are dicts of points, voxels and pictures, and what is compared here is what models make of '
                          'pictures alone',
    MultiBranchDataPreprocessor='multi-branch data (MultiBranchDataPreprocessor) are supported for semi-supervised '
                                'detectors of mmdet (SemiBaseDetector, SoftTeacher) alone',
    TrackDataPreprocessor='models for video, whose samples are several frames (TrackDataPreprocessor), are not '
                          'supported. Distil the detector inside, on single frames (for example CocoDataset with the '
                          "frames' annotations)",
    ReIDDataPreprocessor='models that tell persons apart (ReIDDataPreprocessor) are no detectors and not supported')


def unfit(model: nn.Module) -> Optional[str]:
    """Why a model's kind of data cannot be distilled on; None where it can."""
    kinds = () if is_semi(model) else type(getattr(model, 'data_preprocessor', None)).__mro__
    return next((f'kd_mm.DistillHook: {UNFIT[kind.__name__]}' for kind in kinds if kind.__name__ in UNFIT), None)


def check_folded(distiller: Distiller, cfg: Any) -> None:
    """Refuse taps inside modules that the Runner is about to flatten (``efficient_conv_bn_eval``) or to run without a
    graph (``activation_checkpointing``).

    Raises:
        ValueError: naming the term and the module.
    """
    problems = Problems()
    folded = cfg.get('efficient_conv_bn_eval') or ()
    for module in [folded] if isinstance(folded, str) else folded:
        for term in distiller.all_terms():
            inside = [path for path in term.student_paths if path.startswith(f'{module}.')]
            if inside:
                problems.add(f'{term.name}: efficient_conv_bn_eval flattens {module!r}, so that {inside[0]!r} '
                             f'is not called as a module any more. Tap {module!r} or what comes after it, or '
                             'leave the option out')
    recomputed = cfg.get('activation_checkpointing') or ()
    for module in [recomputed] if isinstance(recomputed, str) else recomputed:
        for term in distiller.all_terms():
            inside = [path for path in term.student_paths if path.startswith(f'{module}.')]
            if inside and _reentrant():
                problems.add(f'{term.name}: activation_checkpointing runs {module!r} without a graph, so that '
                             f'nothing is learned through {inside[0]!r}. Tap {module!r} or what comes after it, or '
                             "leave the option out (a backbone's own with_cp=True works)")
    problems.raise_any()


def _reentrant() -> bool:
    """Whether torch's activation checkpoints, as mmengine calls them, run their part without a graph."""
    seen: List[bool] = []

    def look(tensor: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return tensor * 1

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        checkpoint(look, torch.zeros(1, requires_grad=True))
    return not seen[0]


def check_loop(distiller: Distiller, size: Any, epochs: bool) -> None:
    """Refuse losses on the relations between images where a batch has too few, and weights that wait for an epoch.

    Args:
        distiller: that was built.
        size: images of a process in a batch; None where it is not known.
        epochs: whether the loop has epochs.

    Raises:
        ValueError: naming the terms.
    """
    problems = Problems()
    for fault in distiller.shares.faults(epochs):
        problems.add(fault)
    for term in distiller.all_terms():
        need = term.loss.fewest_images
        if isinstance(size, int) and size < need and not term.shared and any(term.loss.weight.numbers):
            problems.add(f"{term.title}: {type(term.loss).__name__} compares images with each other (samples='image') "
                         f'and needs {need} of them in a process, but train_dataloader.batch_size is {size}: nothing '
                         "would be learned. Use samples='cell', or a larger batch")
    problems.raise_any()
