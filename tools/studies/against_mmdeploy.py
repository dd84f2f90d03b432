#!/usr/bin/env python3
"""What the file of mmdeploy finds beside what mmdet finds: the same model, the same images, box by box.

    pip install --no-deps mmdeploy==1.3.1             # in an environment of its own that has mmdet
    pip install aenum multiprocess onnx onnxruntime   # what it imports
    python tools/studies/against_mmdeploy.py --images val2017 --seed 0

A narrow RetinaNet (ResNet-18) with random weights and a config, as ``kd-mm export`` leaves them: a plain checkpoint.
``mmdeploy.apis.torch2onnx`` writes both as one graph with the post-processing inside, plain onnxruntime runs it on the
images, and its boxes are compared with those of ``model.test_step``: the same class, boxes within 0.5 pixels and
scores within 0.001.  Exits with 1 where one side finds a box that the other does not find.

mmdeploy 1.3.1 leaves torch the choice of the exporter, and the one that newer versions of torch choose needs
onnxscript and does not take its rewriting; in this process torch's older one is the default.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

from others import need  # noqa: E402
from sources import versions  # noqa: E402

PACKAGES = ('mmdet', 'mmdeploy', 'aenum', 'multiprocess', 'onnx', 'onnxruntime')
MEND = ('Install mmdeploy beside mmdet, without its own requirements, which ask for an old protobuf: '
        'pip install --no-deps mmdeploy==1.3.1; pip install aenum multiprocess onnx onnxruntime')
CONFIG = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
#: Half a score is what random weights say; below this one nothing is kept, on either side.
SCORE = 0.2
#: Narrow: what is compared is the post-processing, and the network has every layer of the large one.
MODEL: Dict[str, Any] = dict(
    backbone=dict(depth=18, base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=SCORE))


def student(shape: Tuple[int, int], seed: int) -> Tuple[Any, Any]:
    """The config, whose test pipeline gives images of this height and width, and its model with random weights."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from kd_mm.hosts.models import build_model
    from kd_mm.hosts.zoo import zoo_config

    height, width = shape
    cfg = Config.fromfile(str(zoo_config(CONFIG)))
    cfg.merge_from_dict(dict(model=MODEL))
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.update(scale=(width, height), keep_ratio=False)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # where mmdeploy looks
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(cfg, 'mmdet')
        model.init_weights()
    # As a head begins, every box is its anchor and every score 0.01: nothing would be kept.
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight)
    torch.nn.init.zeros_(model.bbox_head.retina_cls.bias)
    torch.nn.init.normal_(model.bbox_head.retina_reg.weight, std=0.1)
    return cfg, model.eval()


def deploy_config(cfg: Any, shape: Tuple[int, int]) -> Dict[str, Any]:
    """What mmdeploy is told; it takes thresholds from the config of the model where they are there, which they are."""
    rules, (height, width) = cfg.model.test_cfg, shape
    return dict(
        onnx_config=dict(
            type='onnx', export_params=True, keep_initializers_as_inputs=False, opset_version=11, optimize=False,
            save_file='end2end.onnx', input_names=['input'], output_names=['dets', 'labels'],
            input_shape=[width, height]),
        codebase_config=dict(type='mmdet', task='ObjectDetection', model_type='end2end', post_processing=dict(
            score_threshold=rules.score_thr, confidence_threshold=0.005, iou_threshold=rules.nms.iou_threshold,
            max_output_boxes_per_class=200, pre_top_k=5000, keep_top_k=rules.max_per_img, background_label_id=-1)),
        backend_config=dict(type='onnxruntime'))


@contextlib.contextmanager
def older_exporter() -> Iterator[None]:
    """Inside, ``torch.onnx.export`` is the one that traces, where nothing else is said."""
    import torch

    own = torch.onnx.export
    setattr(torch.onnx, 'export', functools.partial(own, dynamo=False))  # noqa: B010 - mypy would see another type
    try:
        yield
    finally:
        setattr(torch.onnx, 'export', own)  # noqa: B010


def write(cfg: Any, model: Any, image: str, shape: Tuple[int, int], folder: Path) -> Path:
    """The file of mmdeploy, from a plain checkpoint."""
    import torch
    from mmengine.config import Config

    student, deploy = folder / 'student.py', folder / 'deploy.py'
    cfg.dump(str(student))
    Config(deploy_config(cfg, shape)).dump(str(deploy))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a', 'b')))),
               folder / 'student.pth')
    with older_exporter():
        from mmdeploy.apis import torch2onnx

        torch2onnx(image, str(folder), 'end2end.onnx', str(deploy), str(student), str(folder / 'student.pth'), 'cpu')
    return folder / 'end2end.onnx'


class Deployed:
    """The file, called as ``model.test_step`` is."""

    def __init__(self, file: Path, model: Any):
        import onnxruntime
        self.session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        self.prepare = model.data_preprocessor

    def __call__(self, data: Dict[str, Any]) -> List[Any]:
        import torch
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        images = self.prepare(data, False)['inputs']
        # It fills up with rows of score 0; boxes are those of the resized image.
        rows, labels = (torch.from_numpy(value[0])
                        for value in self.session.run(['dets', 'labels'], {'input': images.numpy()}))
        kept = rows[:, 4] > SCORE
        factor = torch.tensor(data['data_samples'][0].metainfo['scale_factor']).repeat(2)
        return [DetDataSample(pred_instances=InstanceData(
            bboxes=rows[kept, :4] / factor, scores=rows[kept, 4], labels=labels[kept]))]


def measure(args: argparse.Namespace) -> Any:
    from kd_mm.lab.commands.export import pictures_of
    from kd_mm.lab.models import scope_of
    from kd_mm.lab.onnx_run import compare_with

    try:
        paths = pictures_of(args.images)[:args.count]
    except ValueError as error:
        raise SystemExit(f'against_mmdeploy: {error}') from error
    shape = tuple(args.shape)
    cfg, model = student(shape, args.seed)
    with tempfile.TemporaryDirectory() as folder, scope_of(cfg):
        deployed = Deployed(write(cfg, model, paths[0], shape, Path(folder)), model)
        return compare_with(cfg, model, deployed, paths, shape)


def show(found: Any, args: argparse.Namespace) -> None:
    known = versions(('torch', 'mmdet', 'mmdeploy', 'onnx', 'onnxruntime'))
    print(f'Images of {args.shape[0]}x{args.shape[1]}, seed {args.seed}; '
          f'{", ".join(" ".join(item) for item in known.items())}\n')
    print('| images | boxes of mmdet | of mmdeploy | the same | alone, at the lowest score kept | boxes within, pixels '
          '| scores within |\n|---|---|---|---|---|---|---|')
    print('| ' + ' | '.join(map(str, (found.images, *found.found, found.matched, found.at_edge, f'{found.box:.1g}',
                                      f'{found.score:.1g}'))) + ' |')
    for problem in found.problems:
        print(f'- {problem}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, metavar='DIR', help='a folder of images, or one')
    parser.add_argument('--seed', type=int, default=0, help='of the weights. Default: 0')
    parser.add_argument('--count', type=int, default=16, help='at most so many images. Default: 16')
    parser.add_argument('--shape', nargs=2, type=int, default=(256, 320), metavar=('H', 'W'),
                        help='to which images are brought, multiples of 32. Default: 256 320')
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error('--count must be at least 1')
    if any(side < 32 or side % 32 for side in args.shape):
        parser.error('--shape must be multiples of 32, to which the model pads')
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    need('against_mmdeploy', PACKAGES, MEND)
    warnings.simplefilter('ignore')  # of tracing, by the hundred
    from mmengine.logging import MMLogger

    MMLogger.get_instance('mmengine', log_level='WARNING')  # not how each layer begins
    with contextlib.redirect_stdout(sys.stderr):  # what mmdeploy prints is not part of the table
        found = measure(args)
    show(found, args)
    return 1 if found.problems or found.empty else 0


if __name__ == '__main__':
    sys.exit(main())
