"""The query view on every DETR-type detector of mmdet, compared with what the host itself does with its outputs."""

import copy
import itertools

import pytest
import torch
from detrs import CLASSES, CONFIGS, LAYERS, QUERIES, WIDTH, batch_of, build_detr, recorded_view
from torch import nn

from kd_mm.hosts.heads.query import match_truth, query_taps, query_view
from kd_mm.hosts.places import find, split_levels
from kd_mm.losses.kd_detr import random_points
from kd_mm.ops.boxes import frames, to_centre, to_corners
from kd_mm.ops.matching import hungarian, pair_costs, take_queries
from kd_mm.ops.sampling import seeded_generator
from kd_mm.types.query import QueryView, join_views
from kd_mm.types.records import Call, Recorded

SHARING = [name for name in CONFIGS if name != 'ddq']
DENOISING = ('dino', 'ddq')


@pytest.fixture(scope='module')
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = build_detr(name)
        return built[name].train()

    return get


@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'ddq'])  # DDQ shows its distinct queries only
def test_boxes_and_scores_are_those_of_the_host(models, name):
    """The host's own detections, all of them, are the last layer of the view."""
    model = models(name).eval()
    data = batch_of(model)
    model.bbox_head.test_cfg = dict(max_per_img=QUERIES * (1 if name == 'detr' else CLASSES))
    with torch.no_grad():
        view, _ = recorded_view(model, data, mode='tensor')
        samples = copy.deepcopy(data['data_samples'])
        found = model.predict(data['inputs'], samples, rescale=False)
    shapes = [sample.img_shape for sample in data['data_samples']]
    pixels = to_corners(view.boxes[-1]) * frames(shapes, view.boxes)
    for image, sample in enumerate(found):
        height, width = shapes[image]
        boxes = pixels[image].clone()
        boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
        if view.sigmoid:
            scores, order = view.scores()[-1, image].flatten().sort(descending=True)
            rows, labels = order // CLASSES, order % CLASSES
        else:
            best = view.scores()[-1, image].max(dim=-1)
            scores, rows = best.values.sort(descending=True)
            labels = best.indices[rows]
        result = sample.pred_instances
        torch.testing.assert_close(result.scores, scores, rtol=1e-4, atol=1e-6)
        same = result.labels == labels
        assert same.float().mean() > 0.9  # equal scores leave the order open
        torch.testing.assert_close(result.bboxes[same], boxes[rows][same], rtol=1e-3, atol=0.05)


@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'ddq'])
def test_in_training_the_view_is_what_the_host_matches(models, name):
    """The first calls of the host's loss are the layers' matched queries; denoising queries come later."""
    model = models(name)
    view, records = recorded_view(model, batch_of(model), extra=('loss_by_feat_single', ))
    assert view.logits.shape == (LAYERS, 2, QUERIES, CLASSES + (name == 'detr'))
    assert view.sigmoid == (name != 'detr') and view.queries.shape == (LAYERS, 2, QUERIES, WIDTH)
    total = records['head'].calls[0].output[0].shape[2]
    assert (total > QUERIES) == (name in DENOISING)
    for layer, call in enumerate(records['loss_by_feat_single'].calls[:LAYERS]):
        assert torch.equal(call.args[0], view.logits[layer]) and torch.equal(call.args[1], view.boxes[layer])
    assert all(value.shape[1] == QUERIES for value in view.points.values())


def test_ddq_leaves_its_dense_queries_out(models):
    model = models('ddq')
    view, records = recorded_view(model, batch_of(model))
    start, count = model.cache_dict['dis_query_info']
    logits = records['head'].calls[0].output[0]
    assert start > 0 and count == QUERIES and logits.shape[2] > start + count
    assert torch.equal(view.logits, logits[:, :, start:start + count])
    assert view.decode is None
    model.eval()
    with torch.no_grad():
        assert recorded_view(model, batch_of(model), mode='tensor')[0].logits.shape[2] == QUERIES


@pytest.mark.parametrize('name', CONFIGS)
def test_memory_as_maps(models, name):
    model = models(name)
    view, records = recorded_view(model, batch_of(model))
    levels = 1 if name in ('detr', 'conditional', 'dab') else 4
    assert len(view.memory) == len(view.neck) == levels
    assert [level.shape for level in view.memory] == [level.shape for level in view.neck]
    assert view.memory[0].shape[1] == WIDTH and not torch.equal(view.memory[0], view.neck[0])


@pytest.mark.parametrize('name', CONFIGS)
def test_the_place_is_the_memory_of_the_view(models, name):
    model = models(name).eval()
    data = batch_of(model)
    place = find(model, '@memory')
    assert place.paths == ('neck', 'forward_encoder')
    with torch.no_grad():
        view, _ = recorded_view(model, data, mode='tensor')
        maps = model.extract_feat(data['inputs'])
        inputs, _ = model.pre_transformer(maps, data['data_samples'])
        tokens = model.forward_encoder(**inputs)['memory']
    for mine, theirs in zip(place.pick((*maps, tokens)), view.memory):
        assert torch.equal(mine, theirs)
    # Cell by cell: the tokens of the last level are its rows, one after the other.
    last = view.memory[-1]
    assert torch.equal(tokens[:, -last.shape[2] * last.shape[3]:][:, last.shape[3] + 1], last[:, :, 1, 1])


def test_no_memory_elsewhere():
    with pytest.raises(KeyError, match='Linear has no encoder of tokens'):
        find(nn.Linear(1, 1), '@memory')
    with pytest.raises(ValueError, match='7 tokens of the encoder'):
        split_levels(torch.zeros(1, 7, 4), [torch.zeros(1, 4, 2, 2)])


# ---------------------------------------------------------------- the shared-query pass


@pytest.mark.parametrize('name', SHARING)
def test_own_points_give_own_predictions(models, name):
    """The decoder on its own points, without denoising queries beside them, says what it said."""
    model = models(name).eval()
    with torch.no_grad():
        view, _ = recorded_view(model, batch_of(model), mode='tensor')
        again = view.decode(view.points)
    torch.testing.assert_close(again.logits, view.logits)
    torch.testing.assert_close(again.boxes, view.boxes)
    torch.testing.assert_close(again.queries, view.queries)


def test_denoising_queries_do_not_reach_the_others(models):
    """DINO in training: the matched queries see no denoising query, so decoding them alone gives the same."""
    model = models('dino')
    view, _ = recorded_view(model, batch_of(model))
    torch.testing.assert_close(view.decode(view.points).logits, view.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', SHARING)
def test_points_of_another_detector(models, name):
    model, other = models(name).eval(), build_detr(name, seed=1, base=12, queries=QUERIES + 5).eval()
    data = batch_of(model)
    with torch.no_grad():
        theirs, _ = recorded_view(other, data, mode='tensor')
    view, _ = recorded_view(model, data, mode='tensor')
    shared = view.decode(theirs.points)
    assert shared.logits.shape == theirs.logits.shape and shared.boxes.shape == theirs.boxes.shape
    assert not torch.allclose(shared.logits, theirs.logits)
    shared.logits.sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.encoder.parameters())
    assert model.query_embedding.weight.grad is None if hasattr(model, 'query_embedding') else True
    model.zero_grad()
    drawn = random_points(theirs.points, 20, seeded_generator(0))
    assert set(drawn) == set(theirs.points)
    with torch.no_grad():
        assert torch.isfinite(view.decode(drawn).boxes).all() and view.decode(drawn).boxes.shape[2] == 20


def test_detectors_of_different_kinds_share_nothing(models):
    data = batch_of(models('dab'))
    views = {name: recorded_view(models(name).eval(), data, mode='tensor')[0] for name in ('dab', 'dino', 'detr')}
    with pytest.raises(ValueError, match='DABDETR decodes from query and query_pos and the other model from query and '
                                         'reference_points'):
        views['dab'].decode(views['dino'].points)
    with pytest.raises(ValueError, match='query_pos has 4 channels and the other model.s 256'):
        views['dab'].decode(views['detr'].points)


def test_random_points():
    given = dict(query=torch.randn(2, 500, 8) * 3 + 1, query_pos=torch.zeros(2, 500, 4),
                 reference_points=torch.rand(2, 500, 2))
    drawn = random_points(given, 4000, seeded_generator(3))
    assert {name: tuple(value.shape) for name, value in drawn.items()} == dict(
        query=(2, 4000, 8), query_pos=(2, 4000, 4), reference_points=(2, 4000, 2))
    assert drawn['query'].mean() == pytest.approx(1, abs=0.2) and drawn['query'].std() == pytest.approx(3, abs=0.2)
    # Anchors are before their sigmoid; all positions are uniform.
    for value in (drawn['query_pos'].sigmoid(), drawn['reference_points']):
        assert 0 < value.min() and value.max() < 1 and value.mean() == pytest.approx(0.5, abs=0.05)
    assert all(torch.equal(value[0], value[1]) for value in drawn.values())
    again = random_points(given, 4000, seeded_generator(3))
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(random_points(given, 4000, seeded_generator(4))['query'], drawn['query'])


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize('rows, columns', [(4, 4), (3, 5), (5, 3)])
def test_hungarian_is_the_best_of_all_matchings(rows, columns):
    costs = torch.rand(2, 3, rows, columns, generator=torch.Generator().manual_seed(rows))
    found = hungarian(costs)
    assert found.shape == (2, 3, rows)
    for matrix, chosen in zip(costs.flatten(0, 1), found.flatten(0, 1)):
        pairs = [(row, int(column)) for row, column in enumerate(chosen) if column >= 0]
        assert len(pairs) == min(rows, columns) == len({column for _, column in pairs})
        short, long = sorted((rows, columns))
        every = (sum(matrix[(i, j) if rows <= columns else (j, i)] for i, j in enumerate(order))
                 for order in itertools.permutations(range(long), short))
        assert sum(matrix[pair] for pair in pairs).item() == pytest.approx(min(every).item())


def test_a_cost_that_is_not_finite():
    costs = torch.tensor([[float('nan'), 0.0], [0.0, float('inf')]])
    assert hungarian(costs).tolist() == [1, 0]


def test_pair_costs():
    box, other = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.5, 0.5, 0.2, 0.4])
    costs = pair_costs(torch.stack([box, other]), box[None], 5.0, 2.0)
    assert costs.flatten().tolist() == pytest.approx([-2.0, 5 * 0.2 - 2 * 0.5], abs=1e-6)


@pytest.mark.parametrize('name', SHARING)
def test_match_truth_is_the_host_s_assignment(models, name):
    """Labels and objects of every layer and image as the host's own call of this step has them."""
    model = models(name)
    data = batch_of(model)
    view, records = recorded_view(model, data, extra=('_get_targets_single', ))
    samples = data['data_samples']
    boxes, labels = ([getattr(sample.gt_instances, key) for sample in samples] for key in ('bboxes', 'labels'))
    shapes = [sample.img_shape for sample in samples]
    found = match_truth(model.bbox_head.assigner, view, boxes, labels, shapes, CLASSES)
    for layer in range(LAYERS):
        for image in range(2):
            wanted = records['_get_targets_single'].calls[layer * 2 + image].output
            assert torch.equal(found.labels[layer, image], wanted[0])
            positive = found.objects[layer, image] >= 0
            assert torch.equal(positive.nonzero()[:, 0], wanted[4])
            target = to_centre(boxes[image] / frames(shapes, view.boxes)[image])[found.objects[layer, image, positive]]
            torch.testing.assert_close(wanted[2][positive], target)
    assert found.num_pos.tolist() == [float(sum(map(len, labels)))] * LAYERS


def test_images_without_objects():
    from mmdet.models.task_modules.assigners import HungarianAssigner
    assigner = HungarianAssigner([dict(type='mmdet.BBoxL1Cost')])
    view = QueryView(torch.zeros(1, 1, 4, 3), torch.rand(1, 1, 4, 4))
    found = match_truth(assigner, view, [torch.zeros(0, 4)], [torch.zeros(0).long()], [(8, 8)], 3)
    assert found.labels.tolist() == [[[3] * 4]] and found.objects.unique().tolist() == [-1]
    assert found.num_pos.tolist() == [1.0]


# ---------------------------------------------------------------- small things


def test_corners_and_back():
    boxes = torch.rand(3, 4)
    torch.testing.assert_close(to_centre(to_corners(boxes)), boxes)


def test_take_and_join():
    values = torch.arange(6.).view(1, 1, 3, 2)
    assert take_queries(values, torch.tensor([[[2, 0]]])).flatten().tolist() == [4, 5, 0, 1]
    view = QueryView(torch.zeros(2, 1, 3, 4), torch.rand(2, 1, 3, 4), sigmoid=False)
    joined = join_views([view, view])
    assert joined.logits.shape == (2, 1, 6, 4) and joined.boxes.shape == (2, 1, 6, 4) and not joined.sigmoid


def test_detached_view():
    tensors = {name: torch.rand(2, 1, 3, 4, requires_grad=True) for name in ('logits', 'boxes', 'queries')}
    maps = [torch.rand(1, 4, 2, 2, requires_grad=True)]
    view = QueryView(**tensors, memory=maps, neck=maps, points=dict(query=maps[0])).detach()
    parts = [view.logits, view.boxes, view.queries, *view.memory, *view.neck, *view.points.values()]
    assert not any(part.requires_grad for part in parts)


def test_what_is_no_detr():
    with pytest.raises(ValueError, match='Linear is no DETR-type detector: it has no pre_transformer, forward_encoder'):
        query_taps(nn.Linear(1, 1), 'bbox_head')
    with pytest.raises(ValueError, match='has no boxes'):
        QueryView(torch.zeros(1, 1, 2, 3)).boxes  # noqa: B018


def test_calls_that_do_not_fit(models):
    model = models('detr')

    def record(*outputs):
        found = Recorded(())
        found.calls = tuple(Call((), {}, output) for output in outputs)
        return found

    with pytest.raises(ValueError, match='head ran 2 times'):
        query_view(model, model.bbox_head, dict(head=record(1, 2)))
    with pytest.raises(ValueError, match='does not return class logits'):
        query_view(model, model.bbox_head, dict(head=record(torch.zeros(1)), forward_decoder=record(None)))
