from .heads import AttentionHeadAdapter as AttentionHeadAdapter
from .hub import check_source as check_source, fetch as fetch
from .llama import LlamaAdapter as LlamaAdapter
from .phases import CACHE_NAME as CACHE_NAME
from .pretrained import load_checked as load_checked, quietly as quietly
from .timm import TimmAdapter as TimmAdapter
from .vit import ViTAdapter as ViTAdapter
