"""Every DETR-type detector of mmdet, as its stock config builds it, narrowed."""

import copy
from typing import Any, Dict

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import widths

from kd_mm.hosts.heads.query import query_taps, query_view
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.zoo import zoo_config
from kd_mm.ops.modes import preserved_random_state

#: The width of the transformer stays: some of the host's decoders have it written into their position embeddings.
WIDTH, CLASSES, QUERIES, LAYERS = 256, 3, 12, 2
CONFIGS = dict(
    detr='detr/detr_r50_8xb2-150e_coco.py',
    conditional='conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    dab='dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    deformable='deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    refine='deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py',
    twostage='deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
    dino='dino/dino-4scale_r50_8xb2-12e_coco.py',
    ddq='ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py')


def small(cfg: Config, base: int = 8, classes: int = CLASSES, queries: int = QUERIES) -> Dict[str, Any]:
    """Overrides of ``model`` that leave a narrow backbone, two layers of transformer and a few queries."""
    inner = dict(num_layers=LAYERS, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=32)))
    stages = cfg.model.backbone.get('out_indices', (0, 1, 2, 3))
    model = dict(
        backbone=dict(depth=18, base_channels=base, stem_channels=base, init_cfg=None, frozen_stages=-1),
        neck=dict(in_channels=[widths(base, 18)[stage] for stage in stages]),
        num_queries=queries, encoder=copy.deepcopy(inner), decoder=copy.deepcopy(inner),
        bbox_head=dict(num_classes=classes))
    if 'dn_cfg' in cfg.model:
        model['dn_cfg'] = dict(group_cfg=dict(num_dn_queries=6))
    return model


def detr_config(name: str, **options: Any) -> Config:
    """The stock config, narrowed."""
    cfg = Config.fromfile(str(zoo_config(f'mmdet::{CONFIGS[name]}')))
    cfg.merge_from_dict(dict(model=small(cfg, **options)))
    return cfg


def build_detr(name: str, seed: int = 0, **options: Any) -> Any:
    """The detector in training mode, its predictions spread out by random weights."""
    with preserved_random_state(seed), DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(detr_config(name, **options), 'mmdet')
        model.init_weights()
        for module in model.bbox_head.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.1)
    return model.train()


def batch_of(model: Any, shapes=((128, 160), (96, 128)), seed: int = 0, training: bool = True) -> Dict[str, Any]:
    """Images of different sizes, so that there is padding."""
    parts = [synthetic_batch(model, 1, shape, seed=seed + index) for index, shape in enumerate(shapes)]
    data = {key: [item for part in parts for item in part[key]] for key in parts[0]}
    return model.data_preprocessor(data, training)


def recorded_view(model: Any, data: Any, mode: str = 'loss', extra=()) -> Any:
    """One forward pass: its view, and what was recorded for it and at the methods ``extra`` of the head."""
    taps = {name: Tap(model, path, structured=True) for name, path in query_taps(model, 'bbox_head').items()}
    taps.update({name: Tap(model.bbox_head, name, structured=True) for name in extra})
    for tap in taps.values():
        tap.arm()
    try:
        model(data['inputs'], copy.deepcopy(data['data_samples']), mode=mode)
        records = {name: tap.read() for name, tap in taps.items()}
    finally:
        for tap in taps.values():
            tap.clear()
    view = query_view(model, model.bbox_head, {name: record for name, record in records.items() if name not in extra})
    return view, records
