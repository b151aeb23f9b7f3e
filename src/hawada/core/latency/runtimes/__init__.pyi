from .prepare import prepare_call as prepare_call
