from .boxed_images import coco as coco
from .llms import TextData as TextData, slimpajama as slimpajama, stdlib as stdlib, text as text, wikitext as wikitext
from .masked_images import masks as masks
from .ngram import witten_bell_perplexity as witten_bell_perplexity
from .own import OwnData as OwnData, own_data as own_data
from .qa import QAData as QAData, hotpotqa as hotpotqa, squad as squad
from .vision import VisionData as VisionData, cifar10 as cifar10, digits as digits, imagenet as imagenet
