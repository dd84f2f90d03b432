"""What detectors and segmentors with queries predicted, decoder layer by decoder layer."""

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.types.batch import Features

#: What a decoder starts from: 'query' (N, Q, C), 'query_pos' (N, Q, C or 4), 'reference_points' (N, Q, 2 or 4), as far
#: as the host's decoder takes them.
Points = Dict[str, Tensor]
POINTS = ('query', 'query_pos', 'reference_points')


@dataclass
class QueryAssignment:
    """Which object each query stands for.

    Attributes:
        labels: (L, N, Q), the object's class, ``background`` for a query without.
        objects: (L, N, Q), index of the ground-truth box in its image, -1 for none.
        background: label of everything that is not positive.
        num_pos: (L,), queries with an object, of the batch, at least 1; the mean over the ranks.
    """

    labels: Tensor
    objects: Tensor
    background: int
    num_pos: Tensor


class QueryView:
    """What a DETR-type detector predicted for its queries; float32 or wider.

    Args:
        logits: (L, N, Q, K), the host's sigmoid or softmax not applied; with softmax the last of K is "no object".
        boxes: (L, N, Q, 4) as (cx, cy, w, h) in 0..1; None if a method needs none.
        queries: (L, N, Q, C), what each decoder layer made of the queries; None if not known.
        memory: levels (N, C, H, W): the encoder's output; empty if not known.
        neck: levels (N, C, H, W): the encoder's input.
        points: what the first decoder layer started from; None if not known.
        decode: points -> the view that this detector's decoder makes of them on the same images; None if it cannot.
        assignment: see :class:`QueryAssignment`.
        match: (view, boxes, labels, image shapes, background label) -> the assignment that the host's own assigner of
            this head makes, see :func:`match_truth`; None if it has none.
        sigmoid: whether the classes are independent.
        name: of the head, for messages.
        distributions: (L', N, Q, 4, B) logits of a distribution for each side of a box, of the last L' layers; None if
            the head predicts none.
        partial: whether the decoder has more layers than it shows, as those of RT-DETR in evaluation, which give the
            last one alone.

    Example:
        >>> view = QueryView(torch.zeros(6, 2, 100, 80), torch.rand(6, 2, 100, 4))
        >>> len(view), len(view.detach())
        (6, 6)
    """

    def __init__(self, logits: Tensor, boxes: Optional[Tensor] = None, queries: Optional[Tensor] = None,
                 memory: Sequence[Tensor] = (), neck: Sequence[Tensor] = (), points: Optional[Points] = None,
                 decode: Optional[Callable[[Points], 'QueryView']] = None,
                 assignment: Optional[QueryAssignment] = None, sigmoid: bool = True, name: str = 'head',
                 match: Optional[Callable[..., QueryAssignment]] = None, distributions: Optional[Tensor] = None,
                 partial: bool = False):
        self.match, self.distributions, self.partial = match, distributions, partial
        self.logits, self.queries = logits, queries
        self.memory: Features = tuple(memory)
        self.neck: Features = tuple(neck)
        self.points, self.decode, self.assignment, self.sigmoid, self.name = points, decode, assignment, sigmoid, name
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def boxes(self) -> Tensor:
        """(L, N, Q, 4).

        Raises:
            ValueError: the view has none.
        """
        if self._boxes is None:
            raise ValueError(f'{self.name}: this view has no boxes')
        return self._boxes

    def detach(self) -> 'QueryView':
        """The same view without gradient."""

        def cut(tensor: Optional[Tensor]) -> Optional[Tensor]:
            return None if tensor is None else tensor.detach()

        points = None if self.points is None else {name: value.detach() for name, value in self.points.items()}
        return QueryView(self.logits.detach(), cut(self._boxes), cut(self.queries),
                         [level.detach() for level in self.memory], [level.detach() for level in self.neck], points,
                         self.decode, self.assignment, self.sigmoid, self.name, self.match, cut(self.distributions),
                         self.partial)

    def last(self, count: int) -> 'QueryView':
        """The same view of the last decoder layers alone."""

        def cut(tensor: Optional[Tensor]) -> Optional[Tensor]:
            return None if tensor is None else tensor[-count:]

        found = self.assignment
        if found is not None:
            found = QueryAssignment(found.labels[-count:], found.objects[-count:], found.background,
                                    found.num_pos[-count:])
        return QueryView(self.logits[-count:], cut(self._boxes), cut(self.queries), self.memory, self.neck, self.points,
                         self.decode, found, self.sigmoid, self.name, self.match, cut(self.distributions), self.partial)

    def scores(self) -> Tensor:
        """(L, N, Q, K) probabilities of the classes, without "no object"."""
        return self.logits.sigmoid() if self.sigmoid else self.logits.softmax(dim=-1)[..., :-1]


def same_layers(first: QueryView, second: QueryView) -> Tuple[QueryView, QueryView]:
    """Two views with the same decoder layers, where one shows its last ones alone.

    Example:
        >>> whole = QueryView(torch.zeros(6, 1, 5, 3))
        >>> [len(view) for view in same_layers(whole, QueryView(torch.zeros(1, 1, 5, 3), partial=True))]
        [1, 1]
        >>> [len(view) for view in same_layers(whole, QueryView(torch.zeros(1, 1, 5, 3)))]
        [6, 1]
    """
    shorter, longer = sorted((first, second), key=len)
    if len(shorter) == len(longer) or not shorter.partial:
        return first, second
    return first.last(len(shorter)), second.last(len(shorter))


def join_views(views: Sequence[QueryView]) -> QueryView:
    """Several views of the same images and layers as one, their queries side by side."""
    first = views[0]
    logits, boxes = (torch.cat(parts, dim=2) for parts in zip(*((view.logits, view.boxes) for view in views)))
    corners = [view.distributions for view in views if view.distributions is not None]
    return QueryView(logits, boxes, sigmoid=first.sigmoid, name=first.name, partial=first.partial,
                     distributions=torch.cat(corners, dim=2) if len(corners) == len(views) else None)


class MaskQueryView:
    """What a mask transformer predicted for its queries; float32 or wider.

    Args:
        logits: (L, N, Q, K+1), the last class is "no object".
        masks: L tensors (N, Q, H, W) of logits.
        name: of the head, for messages.

    Example:
        >>> len(MaskQueryView(torch.zeros(3, 2, 5, 4), [torch.zeros(2, 5, 8, 8)] * 3))
        3
    """

    def __init__(self, logits: Tensor, masks: Sequence[Tensor], name: str = 'head'):
        self.logits, self.masks, self.name = logits, tuple(masks), name

    def __len__(self) -> int:
        return len(self.logits)

    def detach(self) -> 'MaskQueryView':
        """The same view without gradient."""
        return MaskQueryView(self.logits.detach(), [layer.detach() for layer in self.masks], self.name)
