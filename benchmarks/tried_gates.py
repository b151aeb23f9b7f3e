"""Gates that were tried without gain, added as users add their own, by `gate._target_`."""

from torch import Tensor

from hawada.core.gates import SigmoidGate


class StraightThroughGate(SigmoidGate):
    """A sigmoid gate that multiplies with 0 or 1, whichever is nearer, and learns as if it had multiplied with itself.

    Bengio et al., Estimating or propagating gradients through stochastic neurons for conditional computation, 2013.
    """

    @property
    def factor(self) -> Tensor:
        soft = self.gate
        return (soft - soft.detach()) + (soft.detach() >= 0.5).to(soft)
