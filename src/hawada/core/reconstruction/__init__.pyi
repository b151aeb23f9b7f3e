from .layers import batch_statistics as batch_statistics, is_centred as is_centred, is_linear as is_linear
from .least_squares import consumers as consumers, reconstruct as reconstruct
from .moments import Moments as Moments
from .rows import input_rows as input_rows, output_rows as output_rows
from .visits import layer_input_and_output as layer_input_and_output
