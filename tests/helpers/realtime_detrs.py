"""Detectors of the RT-DETR kind as others register them under mmdet: small, and written from the papers.

``RTDETR``: attention within the last level and a fusion of the levels from top to bottom, the best cells as queries
with denoising queries before them, a decoder that gives every layer in training and the last one alone in evaluation.
``DFINE``: the same with a distribution for each side of a box; its head gives one prediction more than there are
layers and returns boxes and distributions as a pair of lists.
``DEIM``: that detector with the matchability-aware loss of its classes, which DEIM trains it with; its denser matching
comes from the data (mosaic and mixup).  Import it by ``custom_imports`` or by itself.
"""

from typing import Any

import torch
from detrs import batch_of, detr_config  # noqa: F401
from mmdet.models.dense_heads import DINOHead
from mmdet.models.detectors import DINO
from mmdet.models.detectors.deformable_detr import DeformableDETR
from mmdet.models.layers import DinoTransformerDecoder, inverse_sigmoid
from mmdet.models.losses import QualityFocalLoss
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn import functional as F

from kd_mm.hosts.models import build_model
from kd_mm.ops.modes import preserved_random_state

BINS = 9


class HybridEncoder(nn.Module):
    def __init__(self, width: int, levels: int):
        super().__init__()
        self.within = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.across = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(levels - 1))

    def forward(self, levels):
        top = levels[-1]
        fused = [self.within(top.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(top.shape)]
        for level, conv in zip(reversed(levels[:-1]), self.across):
            above = F.interpolate(fused[0], size=level.shape[2:], mode='nearest')
            fused.insert(0, conv(torch.cat([level, above], dim=1)).relu())
        return fused


class LastLayerDecoder(DinoTransformerDecoder):
    def forward(self, *args, **kwargs):
        hidden, references = super().forward(*args, **kwargs)
        return (hidden, references) if self.training else (hidden[-1:], references[-2:])


@MODELS.register_module(force=True)
class RTDETR(DINO):
    def _init_layers(self):
        self.encoder = HybridEncoder(**self.encoder)
        self.decoder = LastLayerDecoder(**self.decoder)
        self.embed_dims = self.decoder.embed_dims
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)
        self.memory_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
        self.memory_trans_norm = nn.LayerNorm(self.embed_dims)

    def init_weights(self):
        super(DeformableDETR, self).init_weights()

    def pre_transformer(self, mlvl_feats, batch_data_samples=None):
        first = mlvl_feats[0]
        shapes = torch.tensor([level.shape[2:] for level in mlvl_feats], device=first.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(dim=1).cumsum(0)[:-1]])
        ratios = first.new_ones(len(first), len(shapes), 2)
        return (dict(mlvl_feats=mlvl_feats, spatial_shapes=shapes),
                dict(memory_mask=None, spatial_shapes=shapes, level_start_index=starts, valid_ratios=ratios))

    def forward_encoder(self, mlvl_feats, spatial_shapes):
        tokens = [level.flatten(2).transpose(1, 2) for level in self.encoder(mlvl_feats)]
        return dict(memory=torch.cat(tokens, dim=1), memory_mask=None, spatial_shapes=spatial_shapes)


@MODELS.register_module(force=True)
class RTDETRHead(DINOHead):
    def layers(self, hidden_states):
        first = self.num_pred_layer - 1 - len(hidden_states)  # the last branch is the encoder's
        return [(first + index, hidden) for index, hidden in enumerate(hidden_states)]

    def forward(self, hidden_states, references):
        logits, boxes = [], []
        for (layer, hidden), reference in zip(self.layers(hidden_states), references):
            logits.append(self.cls_branches[layer](hidden))
            boxes.append((self.reg_branches[layer](hidden) + inverse_sigmoid(reference, eps=1e-3)).sigmoid())
        return torch.stack(logits), torch.stack(boxes)


@MODELS.register_module(force=True)
class DFINE(RTDETR):
    pass


@MODELS.register_module(force=True)
class DFINEHead(RTDETRHead):
    def _init_layers(self):
        super()._init_layers()
        self.corner_branches = nn.ModuleList(nn.Linear(self.embed_dims, 4 * BINS) for _ in range(self.num_pred_layer))

    def forward(self, hidden_states, references):
        steps = torch.linspace(-0.5, 0.5, BINS)
        logits, boxes, corners = [], [], []
        if self.training:  # the first prediction, before any distribution
            logits.append(self.cls_branches[0](hidden_states[0]))
            boxes.append(references[0])
        for (layer, hidden), reference in zip(self.layers(hidden_states), references):
            logits.append(self.cls_branches[layer](hidden))
            corners.append(self.corner_branches[layer](hidden))
            moved = corners[-1].unflatten(-1, (4, BINS)).softmax(dim=-1) @ steps  # left, top, right, bottom
            centre, size = reference.split(2, dim=-1)
            low, high = centre - size * (0.5 + moved[..., :2]), centre + size * (0.5 + moved[..., 2:])
            boxes.append(torch.cat([(low + high) / 2, high - low], dim=-1))
        return logits, (boxes, corners)

    def loss_by_feat(self, all_layers_cls_scores, all_layers_bbox_preds, *args):
        boxes, _ = all_layers_bbox_preds
        return super().loss_by_feat(torch.stack(all_layers_cls_scores), torch.stack(boxes), *args)

    def predict_by_feat(self, all_layers_cls_scores, all_layers_bbox_preds, **kwargs):
        return super().predict_by_feat(all_layers_cls_scores, all_layers_bbox_preds[0], **kwargs)


@MODELS.register_module(force=True)
class DEIM(DFINE):
    pass


@MODELS.register_module(force=True)
class DEIMHead(DFINEHead):
    pass


@MODELS.register_module(force=True)
class MatchabilityAwareLoss(QualityFocalLoss):
    """Binary cross entropy with the target q^gamma of a matched query, q its IoU; one of no object weighs p^gamma.

    DINO's head gives labels and IoUs to losses of its base class.
    """

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        label, quality = target
        scores, aim = pred.sigmoid(), torch.zeros_like(pred)
        rows = ((label >= 0) & (label < pred.shape[1])).nonzero().flatten()
        aim[rows, label[rows]] = quality[rows].clamp(min=0) ** self.beta
        matched = torch.zeros_like(pred, dtype=torch.bool)
        matched[rows, label[rows]] = True
        each = F.binary_cross_entropy_with_logits(pred, aim, reduction='none')
        each = torch.where(matched, each, each * scores.detach() ** self.beta)
        return self.loss_weight * each.sum() / (avg_factor or 1)


def realtime_config(name: str, **options: Any) -> Config:
    """DINO's stock config with the parts of RT-DETR, D-FINE or DEIM, narrowed."""
    cfg = detr_config('dino', **options)
    kind = dict(rtdetr='RTDETR', dfine='DFINE', deim='DEIM')[name]
    cfg.model.type, cfg.model.bbox_head.type = kind, f'{kind}Head'
    if name == 'deim':
        cfg.model.bbox_head.loss_cls = dict(type='MatchabilityAwareLoss', use_sigmoid=True, beta=1.5, loss_weight=1.0)
    cfg.model.encoder = dict(width=256, levels=4)
    cfg.custom_imports = dict(imports=['realtime_detrs'], allow_failed_imports=False)
    return cfg


def build_realtime(name: str, seed: int = 0, **options: Any) -> Any:
    """The detector in training mode, its predictions spread out by random weights."""
    with preserved_random_state(seed), DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(realtime_config(name, **options), 'mmdet')
        model.init_weights()
        for module in model.bbox_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.1)
    return model.train()
