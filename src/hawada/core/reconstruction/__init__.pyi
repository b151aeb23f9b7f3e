from .least_squares import (
    Moments as Moments,
    batch_statistics as batch_statistics,
    compensate as compensate,
    input_rows as input_rows,
    is_centred as is_centred,
    is_linear as is_linear,
    output_rows as output_rows,
    readers as readers,
    seen as seen,
)
