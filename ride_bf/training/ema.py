"""An exponential moving average of the weights. It is evaluated and saved in place of the weights."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ride_bf.training.lora import merged


class WeightAverage:
    """Averages the weights and running statistics of `model` over the steps. Without decay, it is the model itself.

    After every step: average = decay * average + (1 - decay) * weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        average = get_ema_multi_avg_fn(decay)
        self.averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if decay > 0 else None

    @property
    def networks(self) -> list[nn.Module]:
        """The trained network and, with a decay, the average."""
        return [self.model] if self.averaged is None else [self.model, self.averaged]

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and save. With LoRA, each access makes a copy that has it merged."""
        return merged(self.model if self.averaged is None else self.averaged.module)

    def whole(self, network: nn.Module) -> nn.Module:
        """`network`, which is `evaluated`, as the main process saves it. Every process must call this."""
        return network

    def update(self) -> None:
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averaged is None else self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.averaged is not None:
            self.averaged.load_state_dict(state)
