"""Everything that is imported from torchvision.transforms.v2.functional."""

from torchvision import placeholder


def __getattr__(name: str) -> type:
    return placeholder(name)
