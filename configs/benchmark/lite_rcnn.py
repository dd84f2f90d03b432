# The entries of det_two_stage.py on pretrained backbones, see lite_gfl.py.
_base_ = './det_two_stage.py'

title = 'Faster R-CNN with ImageNet backbones on blood cells (BCCD)'
about = ('EfficientNet-lite2 with a neck of 96 channels and a box head of 256 teaches EfficientNet-lite0 with 48 and '
         '128; both start from ImageNet weights. Four epochs for the students, twelve for the teacher.')
student = 'lite_rcnn_student.py'
teacher = 'lite_rcnn_teacher.py'
weights = 'both'
recipe = True
longer = [1.25, 1.5, 2.0, 2.5]
leading = ['defeat', 'pkd', 'recipe:auto', 'sp', 'chen', 'rkd', 'dist', 'kd', 'dkd', 'pkd+dist', 'pkd:auto']

combinations = {
    'pkd+dist': dict(losses=dict(
        loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0),
        loss_dist=dict(type='DISTLoss', at='@roi_logits'))),
    'pkd+kd': dict(losses=dict(
        loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0),
        loss_kd=dict(type='SoftmaxKDLoss', at='@roi_logits'))),
}
