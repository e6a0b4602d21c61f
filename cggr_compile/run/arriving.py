"""Values that a step computes on the device and the host reads later, without waiting in between."""

from __future__ import annotations

import torch


class Arriving:
    """A tensor on its way to the host: on CUDA its copy into pinned memory starts at once."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._arrival = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.current_stream(tensor.device).record_event()

    def there(self) -> torch.Tensor:
        """The tensor, on the host; waits for the step that computes it where that is not done yet."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensor
