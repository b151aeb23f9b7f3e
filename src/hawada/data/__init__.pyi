from .llms import TextData as TextData, slimpajama as slimpajama, stdlib as stdlib, text as text, wikitext as wikitext
from .ngram import witten_bell_perplexity as witten_bell_perplexity
from .qa import QAData as QAData, hotpotqa as hotpotqa, squad as squad
from .vision import VisionData as VisionData, cifar10 as cifar10, digits as digits, imagenet as imagenet
