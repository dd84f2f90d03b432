"""Semi-supervised detectors of mmdet: two detectors in one model (``student``, ``teacher``), several batches a step."""

from typing import Any, Dict, Optional

from torch import nn

#: The class that all of them derive from.
BASE = 'SemiBaseDetector'
#: Name of a branch -> the method of that class in which the inner student computes its losses.
BRANCHES: Dict[str, str] = {'sup': 'loss_by_gt_instances', 'unsup': 'loss_by_pseudo_instances'}


def is_semi(model: Any) -> bool:
    """Whether a model is a semi-supervised detector."""
    return any(kind.__name__ == BASE for kind in type(model).__mro__)


def inner_student(model: Any) -> nn.Module:
    """The detector that a semi-supervised one trains; any other model itself."""
    return model.student if is_semi(model) else model


def several_branches(model: Any) -> bool:
    """Whether a model takes several batches in a step."""
    kinds = type(getattr(model, 'data_preprocessor', None)).__mro__
    return any(kind.__name__ == 'MultiBranchDataPreprocessor' for kind in kinds)


def preprocessor_of(model: Any) -> Any:
    """What makes the batches of a model: of a semi-supervised one that of each branch."""
    found = getattr(model, 'data_preprocessor', None)
    return getattr(found, 'data_preprocessor', found) if several_branches(model) else found


def own_losses(model: Any) -> Optional[str]:
    """Name of the class that computes the losses of the unlabelled branch in its own way, from parts of the student;
    None where that is the student's ordinary loss.
    """
    method = BRANCHES['unsup']
    owner = next(kind for kind in type(model).__mro__ if method in vars(kind))
    return None if owner.__name__ == BASE else owner.__name__


def labelled_sample(sample: Any) -> Any:
    """The data sample of an item of a data set; of several branches the first that is there."""
    return next(part for part in sample.values() if part is not None) if isinstance(sample, dict) else sample
