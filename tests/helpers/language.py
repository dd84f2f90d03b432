"""Detectors of mmdet that are asked for names: their stock configs, narrowed, with a BERT of one layer made here.

The language model is the real one of transformers, with random weights and a handful of words, written to a folder as
``save_pretrained`` does: nothing is downloaded.
"""

import importlib

from foundation import require
from mmengine.config import Config

from kd_mm.hosts.zoo import zoo_config

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', 'a', 'ball', 'star', 'square', 'disc', 'red']
BACKBONE = dict(embed_dims=24, depths=[1, 1, 1, 1], init_cfg=None)
CONFIGS = dict(
    grounding_dino='grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py',
    glip='glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py')
#: What leaves little of them; the width of the transformer is written into a decoder of the host.
SMALL = dict(
    grounding_dino=dict(
        backbone=BACKBONE, neck=dict(in_channels=[48, 96, 192]), num_queries=12, encoder=dict(num_layers=1),
        decoder=dict(num_layers=1), test_cfg=dict(max_per_img=10)),
    glip=dict(
        backbone=BACKBONE, neck=dict(in_channels=[48, 96, 192], out_channels=16),
        bbox_head=dict(in_channels=16, feat_channels=16, num_dyhead_blocks=1), test_cfg=dict(score_thr=0.0)))


def language_model(folder):
    """Write a BERT into a folder; the name that mmdet takes it by."""
    transformers = require('transformers')
    # mmdet has looked for transformers when it was imported, which may have been before its folder was on the path.
    host = importlib.import_module('mmdet.models.language_models.bert')
    for name, found in (('AutoTokenizer', 'AutoTokenizer'), ('BertConfig', 'BertConfig'), ('HFBertModel', 'BertModel')):
        setattr(host, name, getattr(transformers, found))
    head = importlib.import_module('mmdet.models.dense_heads.atss_vlfusion_head')
    head.BertConfig = transformers.BertConfig
    (folder / 'vocab.txt').write_text('\n'.join(WORDS))
    transformers.BertTokenizerFast(vocab_file=str(folder / 'vocab.txt')).save_pretrained(str(folder))
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32)).save_pretrained(str(folder))
    return str(folder)


def open_vocabulary(name, folder, names=None):
    """A narrowed config of the zoo, whose language model lies in ``folder``.

    Asked for ``names`` names it keeps every box under each of them, whatever random weights prefer.
    """
    cfg = Config.fromfile(str(zoo_config(f'mmdet::{CONFIGS[name]}')))
    cfg.merge_from_dict(dict(model=SMALL[name]))
    if names is not None:
        cfg.model.test_cfg.max_per_img = names * (SMALL[name].get('num_queries') or 1000)
    cfg.model.language_model.name = language_model(folder)
    if 'lang_model_name' in cfg.model.bbox_head:
        cfg.model.bbox_head.lang_model_name = cfg.model.language_model.name
    return cfg
