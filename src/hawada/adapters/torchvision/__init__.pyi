from .resnet import ResNetAdapter as ResNetAdapter
