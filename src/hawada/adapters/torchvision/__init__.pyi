from .detection import Detection as Detection, DetectorAdapter as DetectorAdapter
from .resnet import ResNetAdapter as ResNetAdapter
