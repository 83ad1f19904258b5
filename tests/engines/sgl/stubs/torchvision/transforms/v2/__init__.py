"""Everything that is imported from torchvision.transforms.v2."""

from torchvision import placeholder


def __getattr__(name: str) -> type:
    return placeholder(name)
