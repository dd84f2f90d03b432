# The same student from scratch: everything learns, norms too.
_base_ = './lite_psp_student.py'

model = dict(backbone=dict(pretrained=False, frozen_stages=-1, norm_eval=False))
