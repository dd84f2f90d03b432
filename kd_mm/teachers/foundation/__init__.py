"""Foundation models as teachers: backbones of timm, transformers, torch.hub and mmpretrain.

Each is a model with a ``backbone`` that gives a tuple of maps, so that ``teacher_at='@backbone'`` means the same for
all of them.  Their packages are imported when a config asks for one, and nothing is ever downloaded: a model is made
from what is installed or lies in a folder, and its weights come from a file that the user names.
"""
