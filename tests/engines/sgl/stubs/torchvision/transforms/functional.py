"""Everything that is imported from torchvision.transforms.functional."""

from torchvision import placeholder
from torchvision.transforms import InterpolationMode as InterpolationMode


def __getattr__(name: str) -> type:
    return placeholder(name)
