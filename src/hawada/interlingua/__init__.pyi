from .adapter import Adapter as Adapter
from .encoder import InterlinguaEncoder as InterlinguaEncoder
from .features import (
    DeepPrefix as DeepPrefix,
    LoRA as LoRA,
    Reconstruction as Reconstruction,
    TextAlignment as TextAlignment,
)
from .llms.llm import LMWrapper as LMWrapper
from .llms.tokenizers import ByteTokenizer as ByteTokenizer
from .losses import (
    k_token_ce_from_prefix as k_token_ce_from_prefix,
    kd_first_k_prefix_vs_text as kd_first_k_prefix_vs_text,
    kd_hidden_states_first_k as kd_hidden_states_first_k,
)
from .objective import Objective as Objective
from .pooling import LearnedQueries as LearnedQueries, MeanPooling as MeanPooling
from .recall import Recall as Recall
from .trainer import Schedule as Schedule
